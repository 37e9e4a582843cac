"""Adapters inside the engine: images as read, where their bytes are, the layer that adds them."""
