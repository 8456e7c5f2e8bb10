"""Artifacts out: containers, and files that appear whole or not at all."""
