"""Runs a model layer by layer: weights in, windows through, weights out."""
