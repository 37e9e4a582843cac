"""Loads a transformers model and swaps the layers that the engine replaces."""
