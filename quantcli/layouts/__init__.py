"""Model-folder layouts: how integer codes, scales and zero points are stored."""
