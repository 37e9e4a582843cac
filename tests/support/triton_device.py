"""Where Triton's kernels are tried: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton asks when it is imported, so tests/conftest.py answers before anything else is.
assert (DEVICE.type == "cpu") == (os.environ.get("TRITON_INTERPRET") == "1")
