"""What a quantized model lost against its original: perplexity, KL and the error of every layer.

Both models are transformers' own, in float32, with the same text; the quantized one has the weights that its files mean
(`Stored`), and rounds the inputs of its layers where its format says so. Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from engine.checkpoint.placing import finish, replace_experts, replace_linear
from engine.quant.experts import ExpertWeights
from engine.quant.linear import QuantLinear
from engine.quant.weight import QuantizedWeight
from engine.quantize.source import Source
from engine.quantize.stored import Stored

_ROWS = 64  # of logits in float64 at a time
Errors = dict[str, dict[str, float]]
"""By layer: "weight_error" and "output_error", Frobenius norms of the difference relative to the original's."""


@dataclass(frozen=True, slots=True)
class Quality:
    """On held-out text. `kl`: mean over tokens of KL(original || quantized), in nats."""

    num_tokens: int
    original_perplexity: float
    quantized_perplexity: float
    kl: float


def linear_errors(exact: Tensor, approximate: Tensor, inputs: Tensor) -> dict[str, float]:
    """Shapes: weights [out, in], inputs [.., in]."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    difference = functional.linear(rows, approximate - exact)
    return {
        "weight_error": _ratio(_squares(approximate - exact), _squares(exact)),
        "output_error": _ratio(_squares(difference), _squares(functional.linear(rows, exact))),
    }


def weight_errors(source: Source, stored: Stored) -> Errors:
    """Of every quantized layer; one layer at a time is in memory."""
    errors: Errors = {}
    for layer in source.layers.values():
        exact = source.tensor(layer.stored_as).float()
        difference = stored.weight(layer).dequantize() - exact
        errors[layer.name] = {"weight_error": _ratio(_squares(difference), _squares(exact))}
    return errors


def load_original(source: Source, device: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval().to(device)  # fmt: skip


def load_quantized(source: Source, stored: Stored, config: dict[str, Any], device: str) -> nn.Module:
    """The model of the files in `stored`, which have this config.json."""
    parts = {name for layer in source.layers.values() for name in stored.tensors_of(layer)}
    tensors = {name: stored.tensor(name).float() for name in stored.files if name not in parts}
    for layer in source.layers.values():
        tensors[f"{layer.name}.weight"] = stored.weight(layer).dequantize()
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "model_type")}
    hf_config = AutoConfig.for_model(config["model_type"], **plain)
    model_class = AutoModelForCausalLM._model_mapping[type(hf_config)]
    model = model_class.from_pretrained(None, config=hf_config, state_dict=tensors, dtype=torch.float32).eval()
    _round_activations(model, source, stored)
    return _moved(model, torch.device(device))


def _round_activations(model: nn.Module, source: Source, stored: Stored) -> None:
    """Where the format rounds the inputs of layers, put our layers in the place of transformers'."""
    experts: dict[str, dict[tuple[int, str], QuantizedWeight]] = {}
    for layer in source.layers.values():
        weight, place = stored.weight(layer), layer.place
        if weight.activations is None:
            return  # of all layers or of none
        if place.expert is None or place.part is None:
            replace_linear(model, place.module, weight)
        else:
            experts.setdefault(place.module, {})[place.expert, place.part] = weight
    for module, parts in experts.items():
        indices = sorted({expert for expert, _ in parts})
        weights = [ExpertWeights(*(parts[i, part] for part in ("gate", "up", "down"))) for i in indices]
        replace_experts(model, module, weights)
    finish(model)


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.quantized = module.quantized.to(device)
    return model.to(device)


@torch.inference_mode()
def quality(original: nn.Module, quantized: nn.Module, windows: Tensor) -> Quality:
    """Shapes: windows [windows, tokens]; the first token of each is not predicted."""
    device = next(original.parameters()).device
    losses = [0.0, 0.0]
    kl, num_tokens = 0.0, 0
    for window in windows.to(device):
        ids, predicted = window[None], window[1:]
        logits = [model(ids, use_cache=False).logits[0, :-1] for model in (original, quantized)]
        for begin in range(0, len(predicted), _ROWS):
            rows = slice(begin, begin + _ROWS)
            logs = [functional.log_softmax(each[rows].double(), dim=-1) for each in logits]
            for index, log in enumerate(logs):
                losses[index] -= float(log.gather(1, predicted[rows, None]).sum())
            kl += float((logs[0].exp() * (logs[0] - logs[1])).sum())
        num_tokens += len(predicted)
    before, after = (math.exp(loss / num_tokens) for loss in losses)
    return Quality(num_tokens, before, after, kl / num_tokens)


@torch.inference_mode()
def output_errors(original: nn.Module, quantized: nn.Module, source: Source, windows: Tensor) -> dict[str, float]:
    """Of layers (experts together) on the inputs that they have in the original model, by module."""
    device = next(original.parameters()).device
    squares: dict[str, list[float]] = {}

    def compare(name: str, args: Any, kwargs: Any, exact: Tensor) -> None:
        difference = quantized.get_submodule(name)(*args, **kwargs) - exact
        sums = squares.setdefault(name, [0.0, 0.0])
        sums[0] += _squares(difference)
        sums[1] += _squares(exact)

    with _listening(original, source, compare):
        for window in windows.to(device):
            original(window[None], use_cache=False)
    return {name: _ratio(*sums) for name, sums in squares.items()}


@contextmanager
def _listening(original: nn.Module, source: Source, compare: Any) -> Iterator[None]:
    handles = [
        original.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, y, n=name: compare(n, args, kwargs, y), with_kwargs=True
        )
        for name in sorted({layer.place.module for layer in source.layers.values()})
    ]
    yield
    for handle in handles:
        handle.remove()


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def _ratio(difference: float, exact: float) -> float:
    return math.sqrt(difference / exact) if exact else 0.0
