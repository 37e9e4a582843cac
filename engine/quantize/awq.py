"""AWQ, decoder layer by decoder layer: what is searched for is autoawq's, the loop and what is kept of it are here.

autoawq's loop over a model keeps no checkpoint. It computes the input of a layer with the layers before it as they were
before they were quantized, so a layer that is done needs only to be run once more, not to be searched again.

Source: AWQ, arXiv 2306.00978; files in AutoAWQ's GEMM layout, everything in float16 as autoawq has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.errors import ConfigError, ModelNotSupported
from engine.quant.formats import read_scheme
from engine.quantize.measure import linear_errors
from engine.quantize.options import Options
from engine.quantize.source import Source
from engine.quantize.work import Work

_CLIPPED_TOGETHER = 64  # output channels that autoawq's search takes at once
_PARALLEL_WINDOWS = 8


def configuration(group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": group_size,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def check(source: Source) -> None:
    """Raises: ModelNotSupported naming what autoawq cannot do; ConfigError without autoawq."""
    for layer in source.layers.values():
        if layer.place.expert is not None:
            raise ModelNotSupported(f"{layer.name}: experts are not calibrated; use int4, nf4, int8 or fp8")
        if layer.out_features % _CLIPPED_TOGETHER:
            raise ModelNotSupported(
                f"{layer.name} has {layer.out_features} outputs; autoawq wants multiples of {_CLIPPED_TOGETHER}, "
                "gptq does not"
            )
    _, known = _library()
    if source.config.model_type not in known:
        raise ModelNotSupported(f"autoawq does not know the model type {source.config.model_type!r}; use gptq or int4")


def _library() -> tuple[Any, Any]:
    try:
        from awq import AutoAWQForCausalLM
        from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    except ImportError as error:
        raise ConfigError(f"method='awq' needs autoawq ({error}); pip install 'chorus-serve[quantize]'") from error
    return AutoAWQForCausalLM, AWQ_CAUSAL_LM_MODEL_MAP


@torch.no_grad()
def run(source: Source, options: Options, group_size: int, windows: Tensor, work: Work) -> None:
    """Write every unit that is not done yet. Shapes: windows [windows, tokens]."""
    model = _library()[0].from_pretrained(
        str(source.folder),
        torch_dtype=torch.float32 if options.device == "cpu" else torch.float16,
        device_map=options.device,
        trust_remote_code=False,
        local_files_only=True,
    )
    model.quantize(
        None,
        {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"},
        calib_data=windows.tolist(),
        max_calib_samples=len(windows),
        max_calib_seq_len=windows.shape[1],
        n_parallel_calib_samples=_PARALLEL_WINDOWS,
        quantizer_cls=_quantizer_class(group_size, work),
    )
    rest = len(source.units()) - 1
    if rest not in work.done:
        names = source.units()[None]
        work.finish_unit(rest, {name: _half(name, source.tensor(name)) for name in names})


def _quantizer_class(group_size: int, work: Work) -> type:
    from awq.quantize.quantizer import AwqQuantizer, get_named_linears, get_op_name
    from awq.quantize.scale import apply_clip, apply_scale

    scheme = read_scheme(configuration(group_size), {})

    class LayerByLayer(AwqQuantizer):
        """autoawq's quantizer with a loop that writes each layer, and skips those that are written."""

        def quantize(self) -> None:
            self._prepare()
            for unit, layer in enumerate(tqdm(self.modules, desc="awq", unit="layer")):
                if unit in work.done:
                    self._get_input_feat(layer, {})  # moves self.inps on
                    continue
                prefix = get_op_name(self.model, layer) + "."
                errors = self._quantize_layer(layer)
                tensors = {prefix + name: _half(prefix + name, t) for name, t in layer.state_dict().items()}
                work.finish_unit(unit, tensors, {prefix + name: error for name, error in errors.items()})
                self.modules[unit] = nn.Identity()  # its memory is free

        def _prepare(self) -> None:
            device = next(self.model.parameters()).device
            self.inps: Tensor = self.inps.to(device)
            self.awq_model.move_embed(self.model, device)
            kwargs = self.module_kwargs
            if kwargs.get("position_embeddings") is None:
                kwargs["position_embeddings"] = self.model.model.rotary_emb(self.inps, kwargs["position_ids"])
            kwargs.setdefault("attention_mask", None)

        def _quantize_layer(self, layer: nn.Module) -> dict[str, dict[str, float]]:
            linears = get_named_linears(layer)
            features = self._get_input_feat(layer, linears)
            asked = self.awq_model.get_layers_for_scaling(layer, features, self.module_kwargs)
            apply_scale(layer, [self._search_best_scale(layer, **each) for each in asked], input_feat_dict=features)
            scaled = {name: linear.weight.detach().float().cpu().clone() for name, linear in linears.items()}
            apply_clip(layer, self._search_best_clip(layer, linears, features))
            self._apply_quant(layer, linears)
            return {name: self._errors(name, layer, weight, features[name]) for name, weight in scaled.items()}

        def _errors(self, name: str, layer: nn.Module, scaled: Tensor, inputs: Tensor) -> dict[str, float]:
            """Of weight and output as AWQ has scaled them, columns up and inputs down: the product is the layer's."""
            tensors = {key: t.cpu() for key, t in layer.get_submodule(name).state_dict().items() if key != "bias"}
            out_features, in_features = scaled.shape
            weight = scheme.read(name, in_features, out_features, tensors).dequantize()
            return linear_errors(scaled, weight, inputs.cpu())

    return LayerByLayer


def _half(name: str, tensor: Tensor) -> Tensor:
    """Raises: ModelNotSupported if a value is beyond float16."""
    if not tensor.is_floating_point():
        return tensor.cpu()
    half = tensor.cpu().half()
    if not bool(torch.isfinite(half).all()):
        raise ModelNotSupported(f"{name} has values beyond float16, in which AWQ files are; use gptq or int4")
    return half
