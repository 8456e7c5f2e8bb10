"""Codes and scales trained on the real grid: layer by layer, or end to end."""
