"""Artifacts into other artifacts without a new quantization: containers, names, tokenizers."""
