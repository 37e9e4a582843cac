"""The structures that the kernels read: mirrors of src/linear.h, attention.h and decoder.h, field by field."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # as common.h numbers them


class LoraWeights(ctypes.Structure):
    _fields_ = (
        ("a", c_void_p),
        ("b", c_void_p),
        ("rank", c_int64),
        ("scaling", c_float),
        ("type", c_int32),
        ("scales", c_void_p),
    )


class Quantization(ctypes.Structure):
    _fields_ = (
        ("order", c_void_p),
        ("group_size", c_int64),
        ("kind", c_int32),
        ("inputs", c_int32),
        ("has_zeros", c_int32),
    )


class Member(ctypes.Structure):
    _fields_ = (
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("out_features", c_int64),
        ("y", c_void_p),
        ("lora", c_void_p),
        ("quantization", c_void_p),
    )


class LoraChunk(ctypes.Structure):
    _fields_ = (("row", c_int32), ("num_rows", c_int32), ("slot", c_int32))


class KVCache(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("num_layers", c_int64),
        ("block_size", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("section_bytes", c_int64),
        ("scales_offset", c_int64),
        ("is_bf16", c_int32),
        ("is_int8", c_int32),
    )


class AttentionRows(ctypes.Structure):
    _fields_ = (
        ("slot_mapping", c_void_p),
        ("block_tables", c_void_p),
        ("tiles", c_void_p),
        ("max_blocks", c_int64),
        ("num_rows", c_int64),
        ("num_tiles", c_int64),
    )


class AttentionLayer(ctypes.Structure):
    _fields_ = (
        ("index", c_int64),
        ("num_heads", c_int64),
        ("window", c_int64),
        ("q_row", c_int64),
        ("q_head", c_int64),
        ("k_row", c_int64),
        ("k_head", c_int64),
        ("v_row", c_int64),
        ("v_head", c_int64),
        ("sinks", c_void_p),
        ("scaling", c_float),
        ("softcap", c_float),
    )


class DecoderLayer(ctypes.Structure):
    _fields_ = (
        *((name, Member) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("index", c_int64),
        ("window", c_int64),
        ("scaling", c_float),
        ("norm_eps", c_float),
        ("head_norm_eps", c_float),
    )


class Decoder(ctypes.Structure):
    _fields_ = (
        ("layers", c_void_p),
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("num_heads", c_int64),
        ("rotary_dims", c_int64),
        ("is_bf16", c_int32),
    )
