"""Finds the compiled kernels, tries each against plain torch, and hands them out, or says why there are none.

The library is plain C, built at installation where there is a compiler, and knows neither Python nor torch: one build
serves every version of both. docs/decisions/0009-cpu-kernels-in-c.md
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.native.structs import AttentionLayer, AttentionRows, Decoder, KVCache, Member, Quantization

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "chorus_set_threads": (None, [c_int32]),
    "chorus_use_bf16_instructions": (None, [c_int32]),
    "chorus_use_byte_instructions": (None, [c_int32]),
    "chorus_pack": (None, [c_void_p, c_int64, c_int64, c_void_p, c_int32]),
    "chorus_quantized_panel_bytes": (c_int64, [POINTER(Quantization), c_int64]),
    "chorus_pack_quantized": (None, [*[c_void_p] * 3, c_int64, c_int64, POINTER(Quantization), c_void_p]),
    "chorus_linear": (
        c_int32,
        [c_void_p, c_int64, c_int64, POINTER(Member), c_int64, c_void_p, c_int64, c_int32, c_int32],
    ),
    "chorus_add_lora": (c_int32, [c_void_p, c_int64, c_int64, POINTER(Member), c_int64, c_void_p, c_int64]),
    "chorus_attention": (
        c_int32,
        [POINTER(KVCache), POINTER(AttentionRows), POINTER(AttentionLayer), c_void_p, c_void_p, c_void_p, c_void_p],
    ),
    "chorus_decoder": (
        c_int32,
        [POINTER(Decoder), *[c_void_p] * 4, POINTER(KVCache), POINTER(AttentionRows), c_void_p, c_int64],
    ),
    "chorus_block_weights": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64]),
    "chorus_rms_norm": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_float, c_int32]),
    "chorus_scan_logits": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int32]),
    "chorus_silu_mul": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_int32]),
}
PANEL = 32  # outputs of a packed panel
MAX_CHUNK_ROWS = 16  # rows of a LoRA chunk: enough to share what is read of an adapter, few enough to share out
MAX_ZERO = 255  # of quantized weights, in units of codes: sums stay below 2^31
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)


class NativeUnavailable(Exception):
    """Why the kernels cannot be used here."""


class NativeLibrary:
    """The kernels, with their signatures. `check` turns what they return into errors."""

    def __init__(self, path: Path) -> None:
        try:
            functions = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(functions, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NativeUnavailable(f"{path.name} cannot be loaded: {error}") from error
        self.linear = functions.chorus_linear
        self.add_lora = functions.chorus_add_lora
        self.attention = functions.chorus_attention
        self.decoder = functions.chorus_decoder
        self.block_weights = functions.chorus_block_weights
        self.rms_norm = functions.chorus_rms_norm
        self.scan_logits = functions.chorus_scan_logits
        self.silu_mul = functions.chorus_silu_mul
        self.set_threads = functions.chorus_set_threads
        self._pack = functions.chorus_pack
        self._pack_quantized = functions.chorus_pack_quantized
        self._quantized_panel_bytes = functions.chorus_quantized_panel_bytes
        self._use_bf16_instructions = functions.chorus_use_bf16_instructions
        self.use_byte_instructions = functions.chorus_use_byte_instructions

    def pack(self, weight: Tensor) -> Tensor:
        """A weight [out, in] as `linear` and `decoder` read it, of the same element type."""
        out_features, in_features = weight.shape
        weight = weight.contiguous()
        packed = torch.empty((-(-out_features // PANEL), -(-in_features // 2) * 2, PANEL), dtype=weight.dtype)
        is_bf16 = weight.dtype is torch.bfloat16
        self._pack(weight.data_ptr(), out_features, in_features, packed.data_ptr(), is_bf16)
        return packed

    def pack_quantized(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, how: Quantization) -> Tensor:
        """Codes as `linear` and `decoder` read them.

        Shapes: codes [out, in] of one byte each, or [out, in / 2] of two to a byte; scales float32 [out, groups]; zeros
        int16 [out, groups], between -MAX_ZERO and MAX_ZERO.
        """
        out_features, in_features = codes.shape[0], scales.shape[1] * how.group_size
        codes, scales = codes.contiguous(), scales.contiguous()
        zeros = None if zeros is None else zeros.contiguous()
        panel_bytes = self._quantized_panel_bytes(byref(how), in_features)
        packed = torch.empty((-(-out_features // PANEL), panel_bytes), dtype=torch.uint8)
        self._pack_quantized(
            codes.data_ptr(),
            scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            out_features,
            in_features,
            byref(how),
            packed.data_ptr(),
        )
        return packed

    def choose_instructions(self) -> None:
        """Multiply bfloat16 and bytes in hardware where the processor does, and does it right.

        Raises: NativeUnavailable.
        """
        for use, is_right, supported, what in (
            (self._use_bf16_instructions, _linear_is_right, "_is_avx512_bf16_supported", "linear layer"),
            (self.use_byte_instructions, _quantized_is_right, "_is_vnni_supported", "quantized linear layer"),
        ):
            asked = getattr(torch.cpu, supported, None)  # torch's own names for it may change
            if asked is not None and asked():
                use(1)
                if is_right(self):
                    continue
                use(0)
            if not is_right(self):
                raise NativeUnavailable(f"the compiled {what} does not agree with torch on this processor")


def check(status: int, what: str) -> None:
    """Raises: torch.OutOfMemoryError if a kernel found no memory to work in."""
    if status != 0:
        raise torch.OutOfMemoryError(f"no memory for the working space of {what}")


@cache
def load_library() -> NativeLibrary:
    """The kernels, loaded and tried. Raises: NativeUnavailable saying why there are none."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise NativeUnavailable("the processor has no AVX-512")
    folder = Path(__file__).parent
    paths = [folder / f"_kernels{suffix}" for suffix in EXTENSION_SUFFIXES]
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        raise NativeUnavailable(
            "they were not compiled; install a C compiler, then `pip install --force-reinstall --no-deps -e .`"
        )
    library = NativeLibrary(found)
    library.choose_instructions()
    return library


_TRIED_ROWS = (*range(1, 14), 30)  # each number of rows that a tile can have, and several tiles


def _linear_is_right(library: NativeLibrary) -> bool:
    """Every size of tile, in all dtypes, element by element, beside a row with one value far above the others."""
    generator = torch.Generator().manual_seed(0)
    bf16, float32 = torch.bfloat16, torch.float32
    for dtype, y_dtype, share in ((bf16, bf16, 2**-7), (bf16, float32, 2**-18), (float32, float32, 2**-18)):
        weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((70, 37), (70,)))
        packed = library.pack(weight)
        for num_rows in _TRIED_ROWS:
            x = torch.randn((num_rows, 37), generator=generator)
            x[0, 5] = 1000.0
            x, y = x.to(dtype), torch.empty((num_rows, 70), dtype=y_dtype)
            member = Member(weight=packed.data_ptr(), bias=bias.data_ptr(), out_features=70, y=y.data_ptr())
            types = (dtype is bf16, y_dtype is bf16)
            if library.linear(x.data_ptr(), num_rows, 37, byref(member), 1, None, 0, *types):
                return False
            if not _near(y, x, weight, share, bias):
                return False
    return True


def _quantized_is_right(library: NativeLibrary) -> bool:
    """Codes of four and of eight bits, with zero points, scales of groups and an order of inputs."""
    generator = torch.Generator().manual_seed(0)
    groups, size, out_features = 3, 16, 70
    width = groups * size
    order = torch.randperm(width, generator=generator).to(torch.int32)
    for kind, low, high in ((0, -8, 8), (1, -128, 128)):
        values = torch.randint(low, high, (out_features, width), generator=generator)
        zeros = torch.randint(-3, 4, (out_features, groups), generator=generator, dtype=torch.int16)
        scales = (torch.rand((out_features, groups), generator=generator) + 0.5) / high
        nibbles = (values + 8).to(torch.uint8)
        codes = nibbles[:, 0::2] | nibbles[:, 1::2] << 4 if kind == 0 else values.to(torch.int8)
        weight = torch.empty((out_features, width))
        weight[:, order.long()] = (values - zeros.repeat_interleave(size, dim=1)) * scales.repeat_interleave(
            size, dim=1
        )
        how = Quantization(order=order.data_ptr(), group_size=size, kind=kind, has_zeros=1)
        packed = library.pack_quantized(codes, scales, zeros, how)
        for num_rows in _TRIED_ROWS:
            x, y = torch.randn((num_rows, width), generator=generator), torch.empty((num_rows, out_features))
            member = Member(weight=packed.data_ptr(), out_features=out_features, y=y.data_ptr())
            member.quantization = ctypes.addressof(how)
            if library.linear(x.data_ptr(), num_rows, width, byref(member), 1, None, 0, 0, 0):
                return False
            if not _near(y, x, weight, 2**-12):  # inputs become 16-bit numbers
                return False
    return True


def _near(y: Tensor, x: Tensor, weight: Tensor, share: float, bias: Tensor | None = None) -> bool:
    """Whether y = x W^T + bias, each element within a share of what its terms add up to without their signs."""
    x, weight = x.double(), weight.double()
    offset = 0.0 if bias is None else bias.double()
    limit = share * (functional.linear(x.abs(), weight.abs()) + abs(offset))
    return bool(((y.double() - functional.linear(x, weight) - offset).abs() <= limit).all())
