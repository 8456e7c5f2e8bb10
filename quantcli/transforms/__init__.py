"""Changes of the weights that keep the function: awq, smoothquant, rotate, reorder."""
