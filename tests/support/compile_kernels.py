"""Compile every Triton kernel for a GPU that is not there: launches become compilations. Prints a line for each.

    python tests/support/compile_kernels.py bfloat16
    python tests/support/compile_kernels.py float16 products     # with every kind of quantized weight, nothing else

Run in a process of its own, without TRITON_INTERPRET. The calls are those that an 8B model of the Llama kind makes.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from engine.triton_kernels import attention, elementwise, lora, quant_linear, quant_rows
from engine.triton_kernels.quant_layout import PackedWeight, pack_weight

HOPPER = GPUTarget("cuda", 90, 32)
KERNELS = (
    "_attend", "_combine", "_rms_norm", "_silu_mul", "_rope_and_cache", "_write_kv", "_shrink", "_expand",
    "_few_rows", "_many_rows", "_sum_columns", "_sum_splits", "_round_rows",
)  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiling:
    """In the place of a kernel."""

    def __init__(self, kernel: JITFunction, name: str) -> None:
        self._kernel, self._name = kernel, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: Any, **kwargs: Any) -> None:
        options = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
        values = dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, attributes = {}, {}, {}
        for i, (name, parameter) in enumerate(zip(self._kernel.arg_names, self._kernel.params, strict=True)):
            value = values[name]
            if parameter.is_constexpr or (isinstance(value, int) and value == 1):
                signature[name], constants[(i,)] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = _TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i64" if value >= 2**31 else "i32"
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(self._kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=HOPPER, options=options)
        print(json.dumps({"kernel": self._name, "shared": compiled.metadata.shared}))


def intercept() -> None:
    for module in (attention, elementwise, lora, quant_linear, quant_rows):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction) and name in KERNELS:
                setattr(module, name, Compiling(value, name))


def call_all(dtype: torch.dtype, rows: int) -> None:
    """Shapes of Llama 3.1 8B, with two blocks of cache."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    slots, tables = new(rows, dtype=torch.int64), new(rows, 128, dtype=torch.int64)
    tiles = new(rows, 4, dtype=torch.int32)
    q, out = new(rows, 32, 128), new(rows, 32, 128)
    qkv, angles = new(rows, 48 * 128), new(rows, 128)
    everything = {"window": 512, "softcap": 50.0, "sinks": new(32)}
    few, many, prefill = ((1, 200), (1, 2048), (attention.rows_of_tile(4), 2048))
    for cache_dtype, all_sizes, all_options in (
        (dtype, (few, many, prefill), ({}, everything)),
        (torch.int8, (many, prefill), (everything,)),
        (torch.float8_e4m3fn, (few, prefill), ({},)),
    ):
        cache = new(2, 2, 2, 16, 8, 128, dtype=cache_dtype)
        scales = None if cache_dtype is dtype else new(2, 2, 2, 8, 16, dtype=torch.float32)
        for (tile_rows, max_context), options in itertools.product(all_sizes, all_options):
            sizes = {"tile_rows": tile_rows, "max_context": max_context, "scales": scales}
            attention.paged_attention(q, cache, 1, tables, tiles, out, scaling=0.1, **sizes, **options)
        elementwise.write_kv(new(rows, 8, 128), new(rows, 8, 128), cache, 1, slots, scales)
        elementwise.rope_and_cache(qkv, 32, angles, angles, cache, 1, slots, (new(2, 128), 1e-5), scales)
    elementwise.rope_and_cache(qkv, 32, angles, angles, new(2, 2, 2, 16, 8, 128), 1, slots)
    hidden, weight = new(rows, 4096), new(4096)
    elementwise.rms_norm(hidden, weight, 1e-5)
    elementwise.rms_norm(hidden, weight, 1e-5, residual=new(rows, 4096))
    elementwise.silu_mul(new(rows, 2 * 14336))
    group = lora.LoraGroup.of([0, 1, 2], [4096, 1024, 1024], 4096, "cpu")
    uneven = lora.LoraGroup.of([0], [4090], 4090, "cpu")
    narrow, chunks = new(rows, 4090), new(rows, 3, dtype=torch.int32)
    tables, codes = (lora.LoraTables.empty(3, 9, "cpu", are_codes=are_codes) for are_codes in (False, True))
    lora.add_lora(qkv, hidden, chunks, group, tables, 64)
    lora.add_lora(narrow, narrow, chunks, uneven, tables, 64)
    lora.add_lora(qkv, hidden, chunks, group, codes, 64)


def packed(kind: Any, in_features: int = 1024, out_features: int = 128, group_size: int | None = None) -> PackedWeight:
    """A weight with zeros where it has groups."""
    per_byte = 2 if kind in ("int4", "nf4") else 1
    codes = torch.zeros((out_features, in_features // per_byte), dtype=torch.uint8)
    scales = torch.full((out_features, in_features // (group_size or in_features)), 1.25)
    zeros = None if group_size is None else torch.zeros_like(scales, dtype=torch.int16)
    return pack_weight(kind, codes, scales, zeros, table=torch.zeros(16) if kind == "nf4" else None)


def call_products(dtype: torch.dtype) -> None:
    """Those of one kind and class of rows each: compiling one takes seconds."""
    bias = torch.zeros(128, dtype=dtype)
    for rows, weight in ((1, packed("int4", group_size=128)), (256, packed("int4")), (1, packed("fp8"))):
        quant_linear.quant_linear(torch.zeros((rows, 1024), dtype=dtype), weight, bias)
    for kind, code_type in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        quant_rows.round_rows(torch.zeros((1, 4096), dtype=dtype), kind, code_type)  # type: ignore[arg-type]
    rows, row_scales = torch.zeros((256, 1024), dtype=torch.int8), torch.zeros(256)
    quant_linear.quant_linear(rows, packed("int8"), bias, row_scales, dtype=dtype)


def call_all_products(dtype: torch.dtype) -> None:
    """Every kind for every class of rows, with and without groups, where tiles fit and where they do not."""
    for kind in ("int4", "nf4", "int8", "fp8"):
        for weight in (packed(kind, group_size=128), packed(kind, 8700, 9000 if kind == "int4" else 90)):
            for rows in (1, 16, 32, 64, 256):
                quant_linear.quant_linear(torch.zeros((rows, weight.in_features), dtype=dtype), weight)
    for rows in (1, 16, 32, 64):
        codes = torch.zeros((rows, 1024), dtype=torch.int8)
        quant_linear.quant_linear(codes, packed("int8"), None, torch.zeros(rows), dtype=dtype)


if __name__ == "__main__":
    intercept()
    chosen = getattr(torch, sys.argv[1])
    if sys.argv[2:] == ["products"]:
        call_all_products(chosen)
    else:
        call_all(chosen, rows=4)
        call_products(chosen)
