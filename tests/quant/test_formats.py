"""What holds for every format of quantized checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.errors import ModelNotSupported
from engine.quant.formats import read_scheme
from engine.quant.scheme import TensorSpec


@pytest.mark.parametrize("method", ["hqq", "fp8", "auto-round", "AWQ", None, 4])
def test_a_method_that_is_not_served_is_refused_with_those_that_are(method: Any) -> None:
    served = "awq, bitsandbytes, compressed-tensors, gptq, torchao"
    with pytest.raises(ModelNotSupported, match=f"quant_method={method!r}.*{served}"):
        read_scheme({"quant_method": method}, {})


def test_a_part_of_a_shape_may_be_of_any_length() -> None:
    spec = TensorSpec((torch.uint8,), ((3, None), (7,)))
    assert spec.fits_shape((3, 100))
    assert spec.fits_shape((7,))
    assert not spec.fits_shape((4, 100))
    assert not spec.fits_shape((3,))
