"""Draws what the programs of this package print; `benchmarks.plot` calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.adapters import PLACES

UNDISTURBED, OVERLAPPING = "#9ca3af", "#2563eb"
BY_TIER = {"host": "#1d4ed8", "disk": "#60a5fa", "source": "#d1d5db"}


def first_token(rows: list[dict[str, Any]]) -> Any:
    """What each place adds, by rank; a panel for each model. Dashed: in one process."""
    models = sorted({row["config"]["model"] for row in rows})
    figure, panels = plt.subplots(1, len(models), figsize=(4.6 * len(models), 3.4), sharey=True, squeeze=False)
    ranks = sorted({row["config"]["rank"] for row in rows})
    for axes, model in zip(panels[0], models, strict=True):
        for rank in ranks:
            for is_ray, style in ((True, "o-"), (False, "o--")):
                chosen = [
                    row
                    for place in PLACES
                    for row in rows
                    if (row["place"], row["config"]["model"], row["config"]["rank"], row["config"]["ray"])
                    == (place, model, rank, is_ray)
                ]
                color, label = f"C{ranks.index(rank)}", f"rank {rank}" if is_ray else None
                added = [row["added"]["p50_ms"] for row in chosen]
                axes.plot([row["place"].replace("_", "\n") for row in chosen], added, style, color=color, label=label)
        axes.set_yscale("symlog", linthresh=1)  # a difference may be below zero
        axes.set_title(name_of(model))
        axes.legend(frameon=False)
    panels[0][0].set_ylabel("ms added to the first token, median")
    return figure


def interference(rows: list[dict[str, Any]]) -> Any:
    """Time between tokens without and beside a load."""
    figure, axes = plt.subplots(figsize=(2.2 + 2.2 * len(rows), 3.2))
    labels = []
    for i, row in enumerate(rows):
        for j, percentile in enumerate(("p50_ms", "p99_ms")):
            x = 2 * i + j
            labels.append(f"{percentile[:3]}\n{name_of(row['config']['model'])}")
            for shift, kind, color in ((-0.2, "undisturbed", UNDISTURBED), (0.2, "overlapping", OVERLAPPING)):
                axes.bar(x + shift, row["itl"][kind][percentile], 0.38, color=color, label=None if x else kind)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("ms between tokens")
    axes.legend(frameon=False)
    return figure


def traffic(rows: list[dict[str, Any]]) -> Any:
    """Where requests found their adapter: the store, and plain LRU."""
    figure, axes = plt.subplots(figsize=(2.4 * len(rows) + 1.5, 3.2))
    labels = []
    for row in rows:
        for policy, title in (("", "store"), ("lru_", "LRU")):
            x, below = len(labels), 0.0
            for tier, color in BY_TIER.items():
                share = row[f"{policy}source_rate" if tier == "source" else f"{policy}{tier}_hit_rate"]
                axes.bar(x, share, 0.7, bottom=below, color=color, label=None if x else tier)
                below += share
            labels.append(f"{title}\n{row['case']}")
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("share of the requests")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def name_of(model: str) -> str:
    """Of `.../smol135/base`: smol135."""
    return Path(model).parent.name


FIGURES = (  # (the key that only its rows have, the file, what draws it)
    ("place", "adapters_first_token.svg", first_token),
    ("waited", "adapters_interference.svg", interference),
    ("lru_read_s", "adapters_traffic.svg", traffic),
)
