"""A name becomes a version: asked of its sources, remembered, written down."""
