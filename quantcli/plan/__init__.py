"""Decisions about a model, taken from its headers alone: no weight is read here."""
