"""Bytes out: files and folders that appear whole or not at all."""
