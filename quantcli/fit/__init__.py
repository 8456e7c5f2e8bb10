"""What a model needs to run in llama.cpp, and which type fits a machine: from headers alone."""
