"""Compile every Triton kernel for a GPU that is not there: launches become compilations. Prints a line for each.

    python tests/support/compile_kernels.py bfloat16

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

from engine.triton_kernels import attention, elementwise, lora

HOPPER = GPUTarget("cuda", 90, 32)
KERNELS = ("_attend", "_combine", "_rms_norm", "_silu_mul", "_rope_and_cache", "_write_kv", "_shrink", "_expand")
_OPTIONS = ("num_warps", "num_stages")
_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.float8_e4m3fn: "*fp8e4nv",
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
    for module in (attention, elementwise, lora):
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


if __name__ == "__main__":
    intercept()
    call_all(getattr(torch, sys.argv[1]), rows=4)
