"""What was made, as JSON beside the checkpoint and as a table for who made it."""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from typing import Any

from engine.quantize.measure import Errors, Quality
from engine.quantize.options import Options
from engine.quantize.source import Source
from engine.quantize.stored import Stored

_LIBRARIES = {"awq": ("autoawq",), "gptq": ("gptqmodel",)}


def report(
    source: Source,
    options: Options,
    quantization_config: dict[str, Any],
    stored: Stored,
    errors: Errors,
    quality: Quality | None,
    held_out_from: str | None,
) -> dict[str, Any]:
    """Plain values. `quality`: None where no text was given to measure with."""
    return {
        "method": options.method,
        "quantization_config": quantization_config,
        "bytes": _sizes(source, stored),
        "kept": list(source.kept),
        "held_out": None if quality is None else {"text": held_out_from, **asdict(quality)},
        "layers": errors,
        "versions": versions(options.method),
    }


def versions(method: str) -> dict[str, str]:
    """Of the libraries that do a method's work."""
    return {name: metadata.version(name) for name in ("torch", "transformers", *_LIBRARIES.get(method, ()))}


def _sizes(source: Source, stored: Stored) -> dict[str, Any]:
    """Of the quantized layers, without their biases, and of all tensors; before, in 16 bits, after."""
    layers = source.layers.values()
    elements = sum(layer.out_features * layer.in_features for layer in layers)
    after = sum(stored.files[name].num_bytes for layer in layers for name in stored.tensors_of(layer))
    return {
        "num_layers": len(layers),
        "layers_before": sum(source.files[layer.stored_as].num_bytes for layer in layers),
        "layers_in_16_bits": 2 * elements,
        "layers_after": after,
        "bits_per_weight": 8 * after / elements,
        "model_before": sum(tensor.num_bytes for tensor in source.files.values()),
        "model_after": sum(tensor.num_bytes for tensor in stored.files.values()),
    }


def table(told: dict[str, Any]) -> str:
    """The report as lines of text: sizes, quality, the layers that lost most."""
    sizes, held_out = told["bytes"], told["held_out"]
    lines = [
        f"{'':24}{'before':>12}{'after':>12}{'ratio':>8}",
        _row(f"{sizes['num_layers']} quantized layers", sizes["layers_before"], sizes["layers_after"]),
        _row("  as if in 16 bits", sizes["layers_in_16_bits"], sizes["layers_after"]),
        _row("whole model", sizes["model_before"], sizes["model_after"]),
        f"{sizes['bits_per_weight']:.2f} bits per weight of the quantized layers",
    ]
    if held_out is None:
        lines.append("no text was given to measure with: --held-out FILE tells perplexity and KL")
    else:
        lines += [
            f"perplexity {held_out['original_perplexity']:.4f} -> {held_out['quantized_perplexity']:.4f}, "
            f"KL(original || quantized) {held_out['kl']:.6f} nats per token",
            f"  on {held_out['num_tokens']} tokens of {held_out['text']}",
        ]
    lines.append(f"{'relative error of':48}{'weight':>10}{'output':>10}   (the ten worst of {len(told['layers'])})")
    worst = sorted(told["layers"].items(), key=lambda item: -max(item[1].values()))[:10]
    for name, errors in worst:
        cells = (f"{errors[key]:10.4f}" if key in errors else f"{'-':>10}" for key in ("weight_error", "output_error"))
        lines.append(f"{name:48}{''.join(cells)}")
    return "\n".join(lines)


def _row(label: str, before: int, after: int) -> str:
    return f"{label:24}{_size(before):>12}{_size(after):>12}{after / before:8.3f}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.1f} KiB"
