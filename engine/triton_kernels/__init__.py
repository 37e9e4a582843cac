"""Triton kernels for CUDA devices. They know tensors and nothing of the engine. Tests interpret them."""
