"""What a model does with its own modules: which it calls where they are registered, and whose attributes it reads.

A module may be swapped for another only if the swap is seen by all who use the module and has what they ask of it. A
router that reads `self.gate.weight` beside calling the gate, or instead, is not content with a layer that merely
computes the same. So for one forward every module stands behind another that notes what comes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from engine.quant.embedding import QuantEmbedding
from engine.quant.linear import QuantLinear

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_LEAVES = (nn.Linear, Conv1D, nn.Embedding, QuantLinear, QuantEmbedding)
_OF_CONTAINERS = ("__len__", "__getitem__", "__iter__", "__contains__")


@dataclass(slots=True)
class Use:
    """What was done with one module, from outside of it."""

    num_calls: int = 0
    num_rows: int = 0  # of the last input
    reads: set[str] = field(default_factory=set)  # attributes
    is_linear: bool = True  # a linear layer gave W x + bias, and nothing else, to each call


class _Watched(nn.Module):
    """In the place of a module, as whatever it is asked for."""

    def __init__(self, module: nn.Module, use: Use) -> None:
        super().__init__()
        self._modules["watched"] = module  # past __setattr__
        self.__dict__["use"] = use

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        use: Use = vars(self)["use"]
        use.num_calls += 1
        x = args[0].clone() if args and isinstance(args[0], Tensor) else None  # some layers write into their input
        use.num_rows = 0 if x is None else x.numel() // max(1, x.shape[-1])
        module = self._modules["watched"]
        assert module is not None
        y = module(*args, **kwargs)
        if is_derived_linear(module):
            use.is_linear &= x is not None and len(args) + len(kwargs) == 1 and _is_product(module, x, y)
        return y

    def __getattr__(self, name: str) -> Any:
        return self._read(name)

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)["use"].reads.add(name)
        setattr(self._modules["watched"], name, value)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self._read("parameters")(recurse)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        return self._read("buffers")(recurse)

    def _read(self, name: str) -> Any:
        vars(self)["use"].reads.add(name)
        return getattr(self._modules["watched"], name)


def may_replace(uses: Mapping[str, Use] | None, name: str, *attributes: str) -> bool:
    """Whether a module with these attributes is all that the rest of the model needs in the place of this one.

    `uses` None: nothing is known, and everything may be replaced.
    """
    return uses is None or (name in uses and uses[name].reads <= set(attributes))


def where_it_failed(model: nn.Module, error: BaseException) -> str:
    """Name and class of the innermost module whose forward an error came out of; else the model's class."""
    names = {module: name for name, module in model.named_modules() if name}
    found = type(model).__name__
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module in names:
            found = f"{names[module]} ({type(module).__name__})"
        trace = trace.tb_next
    return found


def is_derived_linear(module: nn.Module) -> bool:
    """Whether this is called a linear layer, but has a forward of its own."""
    stock = {nn.Linear: nn.Linear.forward, Conv1D: Conv1D.forward}
    kind = next((kind for kind in stock if isinstance(module, kind)), None)
    return kind is not None and ("forward" in vars(module) or type(module).forward is not stock[kind])


def watch(model: nn.Module, run: Callable[[], Any]) -> dict[str, Use]:
    """By name, what `run()`, a forward of the model, does with each module below the root.

    If the model cannot do with others in the place of all its modules, only its linear layers and embeddings are
    watched; if not with these, what is said of them is that they are not used: then nothing may take their place.
    """
    for wanted in (nn.Module, _LEAVES):
        with _watched(model, wanted) as uses:
            try:
                run()
                return uses
            except Exception:  # whatever a model raises that looks too closely at its parts
                continue
    return {name: Use() for name, _ in model.named_modules()}


@contextmanager
def _watched(model: nn.Module, wanted: Any) -> Iterator[dict[str, Use]]:
    uses: dict[str, Use] = {}
    stand_ins: dict[nn.Module, _Watched] = {}
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for name, module in list(model.named_modules()):
        if name and isinstance(module, wanted) and not _is_container(module):
            uses[name] = Use()
            stand_ins[module] = _Watched(module, uses[name])
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):  # under every name that it has
            if module in stand_ins:
                parent._modules[child] = stand_ins[module]
                swapped.append((parent, child, module))
    try:
        yield uses
    finally:
        for parent, child, module in swapped:
            parent._modules[child] = module


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS) or any(hasattr(type(module), name) for name in _OF_CONTAINERS)


def _is_product(module: Any, x: Tensor, y: Any) -> bool:
    weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
    if not isinstance(y, Tensor) or y.dtype is not x.dtype or y.shape != (*x.shape[:-1], weight.shape[0]):
        return False
    expected = functional.linear(x, weight, module.bias).float()
    limit = 16 * torch.finfo(y.dtype).eps * float(expected.abs().max())
    return bool((y.float() - expected).abs().max() <= limit)
