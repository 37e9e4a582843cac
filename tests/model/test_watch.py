"""A layer is swapped only if it is what it looks like, and if nobody looks at more of it than its swap has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from engine.config import EngineConfig
from engine.errors import ModelNotSupported
from engine.model.capabilities import judge
from engine.model.loader import LoadedModel
from engine.model.probe import probe
from engine.model.surgery import find_sites
from engine.model.watch import Use, is_derived_linear, may_replace, watch, where_it_failed
from engine.runner.runner import TorchRunner
from tests.support.tiny_model import make_config

WIDTH = 8


class Routed(nn.Linear):
    """As routers of Llama 4 and PhiMoE: a linear layer by its class, that gives more than a product."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return logits, logits.topk(1).indices


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return super().forward(x) * factor


class SameByOtherMeans(nn.Linear):
    """As Falcon's: the same numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Model(nn.Module):
    """One linear layer, used in some way."""

    def __init__(self, layer: nn.Module, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer = layer
        self.aside = [layer]  # a list that is no module list: what is swapped does not get there
        self.use = use
        self.use_of = use.__name__

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def looked_at(layer: nn.Module, use: Callable[[Any, Tensor], Any]) -> Use:
    model = Model(layer, use)
    seen = watch(model, lambda: model(torch.randn(3, WIDTH)))["layer"]
    assert model.layer is layer
    return seen


USES: dict[str, tuple[Callable[[Any, Tensor], Any], int, set[str]]] = {
    "called": (lambda m, x: m.layer(x), 1, set()),
    "called twice": (lambda m, x: m.layer(m.layer(x)), 2, set()),
    "called by its forward": (lambda m, x: m.layer.forward(x), 1, set()),
    "asked for its dtype": (lambda m, x: m.layer(x.to(m.layer.weight.dtype)), 1, {"weight"}),
    "asked for its device": (lambda m, x: m.layer(x.to(m.layer.weight.device)), 1, {"weight"}),
    "asked for its width": (lambda m, x: m.layer(x)[:, : m.layer.out_features], 1, {"out_features"}),
    "its weight used instead": (lambda m, x: functional.linear(x, m.layer.weight), 0, {"weight"}),
    "its weight used beside": (lambda m, x: m.layer(x) + x @ m.layer.weight.T, 1, {"weight"}),
    "its bias left away": (lambda m, x: m.layer(x) - m.layer.bias, 1, {"bias"}),
    "its parameters listed": (lambda m, x: m.layer(x.to(next(m.layer.parameters()).dtype)), 1, {"parameters"}),
    "written to": (lambda m, x: (setattr(m.layer, "seen", 1), m.layer(x))[1], 1, {"seen"}),
    "called past its name": (lambda m, x: m.aside[0](x), 0, set()),
    "not called": (lambda m, x: x, 0, set()),
}


@pytest.mark.parametrize("case", USES)
def test_what_is_done_with_a_layer_is_seen(case: str) -> None:
    use, num_calls, reads = USES[case]
    seen = looked_at(nn.Linear(WIDTH, WIDTH), use)
    assert (seen.num_calls, seen.reads) == (num_calls, reads)
    assert may_replace({"layer": seen}, "layer") is (not reads)
    assert may_replace({"layer": seen}, "layer", "in_features", "out_features", "seen") is (
        reads <= {"out_features", "seen"}
    )


def replaced_forward() -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.forward = lambda x: functional.linear(x, layer.weight) * 3  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("layer", "is_linear"),
    [
        (nn.Linear(WIDTH, WIDTH), True),
        (Conv1D(WIDTH, WIDTH), True),
        (SameByOtherMeans(WIDTH, WIDTH), True),
        (SameByOtherMeans(WIDTH, WIDTH, bias=False), True),
        (Routed(WIDTH, WIDTH), False),
        (Scaled(WIDTH, WIDTH), False),
        (Doubled(WIDTH, WIDTH), False),
        (replaced_forward(), False),
    ],
)
def test_a_layer_is_linear_by_what_it_gives(layer: nn.Module, is_linear: bool) -> None:
    assert looked_at(layer, lambda m, x: m.layer(x)).is_linear is is_linear
    assert is_derived_linear(layer) is (type(layer) not in (nn.Linear, Conv1D) or "forward" in vars(layer))


def test_a_layer_that_is_given_more_than_its_input_is_not_linear() -> None:
    assert not looked_at(Doubled(WIDTH, WIDTH), lambda m, x: m.layer(x, factor=1.0)).is_linear


def test_where_nothing_is_known_everything_may_be_replaced_and_where_nothing_was_seen_nothing_may() -> None:
    assert may_replace(None, "anything")
    assert not may_replace({}, "anything")


def test_an_error_is_told_by_the_innermost_module_that_it_comes_from() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 6)))
    with pytest.raises(RuntimeError) as caught:
        model(torch.zeros(1, 2))
    assert where_it_failed(model, caught.value) == "1.1 (Linear)"
    assert where_it_failed(model, ValueError("of something else")) == "Sequential"


# ---- changes to a real model, made from outside: each is served rightly, or refused by its name


def llama() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama"), dtype=torch.float32).eval()
    model.config._attn_implementation = "chorus_paged"
    return model


def change_forward(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module.forward = make(module.forward)  # type: ignore[method-assign]


def load(model: Any) -> LoadedModel:
    trace = probe(model)
    capabilities = judge(model, trace, 64)
    return LoadedModel(
        model=model, hf_config=model.config, sites=find_sites(model, trace), capabilities=capabilities, fingerprint="",
        dtype=torch.float32, device=torch.device("cpu"), eos_token_ids=(), max_model_len=64, uses=trace.uses,
    )  # fmt: skip


def test_a_weight_that_is_used_without_its_layer_makes_it_no_site() -> None:
    model = llama()
    mlp = model.model.layers[1].mlp
    change_forward(mlp, lambda _: lambda x: mlp.down_proj(functional.linear(x, mlp.gate_proj.weight) * mlp.up_proj(x)))
    names = {site.name for site in load(model).sites}
    assert "model.layers.1.mlp.gate_proj" not in names
    assert {"model.layers.1.mlp.up_proj", "model.layers.0.mlp.gate_proj"} <= names


def test_positions_that_a_model_counts_by_itself_are_refused_by_the_layer_s_name() -> None:
    model = llama()
    rotary = model.model.rotary_emb
    # As BART: by where a row lies, whatever the position ids say.
    change_forward(rotary, lambda f: lambda x, position_ids: f(x, torch.arange(x.shape[1])[None]))
    with pytest.raises(ModelNotSupported, match=r"model\.layers\.0\.self_attn.*places rows by where they lie"):
        load(model)


def test_positions_that_do_not_begin_at_0_are_refused_by_the_layer_s_name() -> None:
    model = llama()
    # As RoBERTa: its own positions begin behind the padding's id, and position ids are taken as they come.
    change_forward(
        model.model,
        lambda f: (
            lambda *args, position_ids=None, **kwargs: f(
                *args, position_ids=torch.arange(2, 15)[None] if position_ids is None else position_ids, **kwargs
            )
        ),
    )
    with pytest.raises(ModelNotSupported, match=r"model\.layers\.0\.self_attn.*counts positions otherwise"):
        load(model)


def test_what_would_end_the_engine_at_its_first_request_ends_its_start() -> None:
    loaded = load(llama())

    def fail(*_: Any, **__: Any) -> Any:
        raise AttributeError("'PackedLinear' object has no attribute 'weight'")

    loaded.model.model.norm.forward = fail
    with pytest.raises(ModelNotSupported, match=r"model\.norm \(LlamaRMSNorm\) fails in a first step"):
        TorchRunner(loaded, EngineConfig(model="unused", kernels="torch", num_threads=1), 8)
