"""One quantization from a request to files: plan, choose types, transform, round, write."""
