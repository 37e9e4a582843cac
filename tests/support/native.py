"""The compiled kernels for tests, which are left out where there are none: no AVX-512, or no C compiler."""

from __future__ import annotations

import pytest
import torch

from engine.native.library import NativeLibrary, NativeUnavailable, load_library


def native_or_skip(num_threads: int = 2) -> NativeLibrary:
    try:
        library = load_library()
    except NativeUnavailable as error:
        pytest.skip(f"no compiled kernels here: {error}")
    library.set_threads(num_threads)
    return library


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest element expected."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
