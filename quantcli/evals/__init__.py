"""What a quantization costs: perplexity, and divergence from the unquantized model."""
