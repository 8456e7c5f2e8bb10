"""Floats into codes: nearest, error feedback (GPTQ) and descent, on every grid."""
