"""Which modules of a model can carry LoRA, as one frozen, ordered tuple; and the swap of those modules."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.image_spec import LinearSite
from engine.lora.batch import LoraBatch
from engine.lora.linear import LoraEmbedding, LoraLinear
from engine.model.probe import NUM_ROWS, SAMPLED_ROWS, Trace
from engine.model.watch import Use
from engine.quant.embedding import QuantEmbedding
from engine.quant.linear import QuantLinear

# How tensor parallelism would cut a layer, by the last part of its name (Megatron-LM, arXiv 1909.08053): layers that
# write into the residual stream are cut along their inputs, the others along their outputs. A fused projection is not
# cut by one split. `dense` is GPT-NeoX's output projection.
_CUT_ALONG_INPUT = frozenset(
    {"o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo"}
)
_FUSED = frozenset({"qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj"})
_LINEAR = nn.Linear | Conv1D | QuantLinear
_EMBEDDING = nn.Embedding | QuantEmbedding
_LAYER = re.compile(r"\.(\d+)\.")


def find_sites(model: nn.Module, trace: Trace) -> tuple[LinearSite, ...]:
    """Every linear layer and input embedding, quantized or not, that saw exactly the step's rows, once or more.

    The output layer, and what is with it behind the decoder layers: the step's sampled rows. What fails that is no
    site: a layer inside an expert sees only the rows routed to it, a vision tower none. Nor is what is derived from a
    linear layer and computes something else (a router that chooses experts too), or whose weight is used without
    calling it.
    Order is that of `named_modules`, so it is the same on every machine. Sites that were given the same tensor form
    a fusion group: q/k/v, gate/up, or all five where attention and MLP are parallel.
    """
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if module is embeddings:
            if isinstance(module, _EMBEDDING) and _use(name, trace).num_calls == 1:
                found.append((name, module))
        elif isinstance(module, _LINEAR) and _sees_all_rows(name, module is head, trace):
            found.append((name, module))
    groups = _fusion_groups([name for name, module in found if not isinstance(module, _EMBEDDING)], trace)
    return tuple(_site(index, name, module, groups.get(name)) for index, (name, module) in enumerate(found))


def find_unused(model: nn.Module, trace: Trace, sites: tuple[LinearSite, ...]) -> tuple[str, ...]:
    """The largest modules that no text passes through: towers for images and sound, and what projects from them.

    None is part of a decoder layer: an expert to which no row of the probe was routed is used by other texts.
    """
    used = [*trace.inputs, *(site.name for site in sites)]
    busy = {".".join(name.split(".")[:depth]) for name in used for depth in range(1, name.count(".") + 2)}
    found: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{part}.") for part in found)
        if not name or name in busy or is_inside or any(part.isdecimal() for part in name.split(".")):
            continue
        if any(isinstance(each, _LINEAR | _EMBEDDING) for each in module.modules()):
            found.append(name)
    return tuple(found)


def install_lora(
    model: nn.Module, sites: tuple[LinearSite, ...], batch: LoraBatch, uses: Mapping[str, Use] | None = None
) -> None:
    """Put a LoRA layer in the place of each site's module, around it. `uses`: what the probe saw of the modules."""
    sampled = {site.name for site in sites if site.kind == "linear" and sees_sampled_rows(model, site.name, uses)}
    for site in sites:
        parent_name, _, child = site.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = parent.get_submodule(child)
        if site.kind == "embedding":
            setattr(parent, child, LoraEmbedding(base, site, batch))
        else:
            setattr(parent, child, LoraLinear(base, site, batch, sampled=site.name in sampled))


def _sees_all_rows(name: str, is_head: bool, trace: Trace) -> bool:
    calls = trace.inputs.get(name, [])
    use = _use(name, trace)
    rows = {call.numel() // call.shape[-1] for call in calls}
    if len(rows) != 1 or use.num_calls != len(calls) or not use.is_linear or ".experts." in name:
        return False
    sees_sampled = is_head or (use.num_rows == len(SAMPLED_ROWS) and _LAYER.search(name) is None)
    return use.num_rows == (len(SAMPLED_ROWS) if sees_sampled else NUM_ROWS)


def sees_sampled_rows(model: nn.Module, name: str, uses: Mapping[str, Use] | None) -> bool:
    """Whether a site is given the sampled rows only: the output layer is, and what is with it behind the layers."""
    is_head = model.get_submodule(name) is model.get_output_embeddings()
    return is_head or (uses is not None and name in uses and uses[name].num_rows == len(SAMPLED_ROWS))


def _use(name: str, trace: Trace) -> Use:
    return trace.uses.get(name, Use())


def _fusion_groups(names: list[str], trace: Trace) -> dict[str, str]:
    readers: dict[int, list[str]] = {}
    for name in names:
        if len(trace.inputs[name]) > 1:
            continue  # it is called with several tensors
        readers.setdefault(id(trace.inputs[name][0]), []).append(name)  # the trace keeps the tensors, so ids are unique
    groups = {}
    for members in readers.values():
        if len(members) > 1:
            parents = [name.split(".")[:-1] for name in members]
            depth = next((i for i, parts in enumerate(zip(*parents, strict=False)) if len(set(parts)) > 1), None)
            common = parents[0][:depth] if depth is not None else min(parents, key=len)
            label = ".".join(common) + "." + "+".join(name.split(".")[-1] for name in members)
            groups.update(dict.fromkeys(members, label))
    return groups


def _site(index: int, name: str, module: nn.Module, group: str | None) -> LinearSite:
    layer = _LAYER.search(name)
    leaf = name.rpartition(".")[2]
    if isinstance(module, _EMBEDDING):
        return LinearSite(
            index=index,
            name=name,
            in_features=module.num_embeddings,
            out_features=module.embedding_dim,
            kind="embedding",
        )
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape  # stored transposed
    else:
        assert isinstance(module, nn.Linear | QuantLinear)
        in_features, out_features = module.in_features, module.out_features
    return LinearSite(
        index=index,
        name=name,
        in_features=in_features,
        out_features=out_features,
        layer=None if layer is None else int(layer[1]),
        fusion_group=group,
        shard_axis=None if leaf in _FUSED else "in" if leaf in _CUT_ALONG_INPUT else "out",
    )
