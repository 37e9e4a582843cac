"""Kernels in C for CPUs with AVX-512, reached through ctypes. Each has a twin in torch, for all else."""
