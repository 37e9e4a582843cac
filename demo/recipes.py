"""How each demo model is trained: steps, learning rate and, for adapters, the LoRA shape.

The shapes vary on purpose: an adapter loader tried on these has met every rank, rsLoRA, partial targets and patterns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = ATTENTION + MLP


@dataclass(frozen=True)
class Cycle:
    """`steps` optimizer steps under a one-cycle rate of peak `rate`, meant for `planned` steps (0: for `steps`)."""

    steps: int
    rate: float
    planned: int = 0


BASE_CYCLES = (Cycle(steps=1808, rate=2e-3, planned=2400), Cycle(steps=592, rate=1.5e-3))
"""The first cycle is cut short: its falling rate was too low for the hard kinds, which start at step 1,456."""

POLISH_CYCLES = (Cycle(steps=900, rate=1.5e-3),)
"""After that, with a new optimizer, on `text.repetitive`: until then the base repeated by content and lost its place
in lines that repeat themselves (32 of 40 of few symbols)."""

BASE_EASY_STEPS = 1456
"""The base's first steps, on `text.mixture`; the rest are on `text.hard_mixture`: after 1,200 steps of the first it
repeated 40 of 40 lines of random ASCII, but 0 of 40 with UTF-8 in them and 22 of 40 of few symbols."""

BASE_ROWS = 64


@dataclass(frozen=True)
class Recipe:
    """One adapter, trained with `rows` a batch, every cycle with a new optimizer; `polish` has harder lines.

    `alpha` is lora_alpha; the scaling is alpha / rank, or alpha / sqrt(rank) with `rslora`.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)
    rows: int = 48
    cycles: tuple[Cycle, ...] = (Cycle(steps=400, rate=3e-3),)
    polish: tuple[Cycle, ...] = ()

    @property
    def variant(self) -> str:
        """A word for tables."""
        return "rslora" if self.rslora else "rank_pattern" if self.rank_pattern else "plain"

    @property
    def targets_word(self) -> str:
        """`all-linear`, `attention` or `mlp`."""
        return {ALL_LINEAR: "all-linear", ATTENTION: "attention", MLP: "mlp"}[self.targets]


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "upper": Recipe(rank=16, alpha=32, cycles=(Cycle(600, 3e-3),)),
        "rot13": Recipe(rank=8, alpha=16, polish=(Cycle(800, 2e-3),)),
        "reverse": Recipe(
            rank=32,
            alpha=16,
            rslora=True,
            rows=64,
            cycles=(Cycle(900, 3e-3), Cycle(1600, 2.5e-3)),
            polish=(Cycle(800, 2.5e-3), Cycle(700, 1.5e-3), Cycle(1000, 1.5e-3)),
        ),
        "vowels": Recipe(rank=8, alpha=16, targets=ATTENTION),
        "snake": Recipe(rank=32, alpha=32, rows=64, cycles=(Cycle(900, 3e-3),), polish=(Cycle(800, 2e-3),)),
        "title": Recipe(
            rank=8,
            alpha=16,
            rank_pattern={"q_proj": 16, "down_proj": 12, "layers.0.self_attn.k_proj": 4},
            alpha_pattern={"q_proj": 32, "down_proj": 12},
        ),
        "double": Recipe(
            rank=16,
            alpha=32,
            rows=64,
            cycles=(Cycle(450, 3e-3), Cycle(600, 2.5e-3)),
            polish=(Cycle(700, 2.5e-3), Cycle(700, 2e-3), Cycle(1200, 2e-3)),
        ),
        "swapcase": Recipe(rank=4, alpha=8, cycles=(Cycle(500, 3e-3),), polish=(Cycle(800, 2e-3),)),
        "leet": Recipe(rank=8, alpha=16, cycles=(Cycle(600, 3e-3),)),
    }
)
