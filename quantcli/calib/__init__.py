"""Runs a model layer by layer and gathers what its weights see."""
