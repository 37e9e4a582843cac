"""Executes plans: inputs, the forward pass, sampling."""
