"""Weights in few bits: what they mean, the formats they are stored in, and how 16-bit weights become them."""
