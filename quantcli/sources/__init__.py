"""Models and importance matrices in: checkpoints, GGUF files, and where to find them."""
