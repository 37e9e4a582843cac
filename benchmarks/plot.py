"""Draw the committed results: ours beside its peers, what adapters cost, and what a cold one does.

pip install matplotlib && python -m benchmarks.plot benchmarks/results/*.jsonl --out docs/figures
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from benchmarks.adapters.draw import FIGURES

OURS, PEER = "#2563eb", "#9ca3af"


def read(paths: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.startswith("{")]


def draw_comparisons(rows: list[dict[str, Any]], out: Path) -> None:
    """A pair of bars for each comparison, with the median of the ratios above."""
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(1.9 * len(rows) + 1.5, 3.4))
    for i, row in enumerate(rows):
        ours, peer = statistics.median(row["ours"]), statistics.median(row["peer"])
        axes.bar(i - 0.2, ours, 0.38, color=OURS, label="Chorus" if i == 0 else None)
        axes.bar(i + 0.2, peer, 0.38, color=PEER, label="peer" if i == 0 else None)
        axes.annotate(f"x {row['median_ratio']:.1f}", (i, max(ours, peer)), ha="center", va="bottom")
    axes.set_xticks(range(len(rows)), [row["title"] for row in rows])
    axes.set_ylabel("output tokens / s")
    axes.legend(frameon=False)
    save(figure, out / "peers.svg")


def draw_lora_cost(rows: list[dict[str, Any]], out: Path) -> None:
    """Share of the base's throughput by the number of adapters in the batch."""
    if not rows:
        return
    figure, axes = plt.subplots(figsize=(4.6, 3.2))
    for kind in ("uniform", "zipf"):
        of_kind = [row for row in rows if row["case"].endswith(kind)]
        axes.plot([r["adapters_in_batch"] for r in of_kind], [r["share_of_base"] for r in of_kind], "o-", label=kind)
    axes.set(xlabel="adapters in the batch", ylabel="share of the base's throughput", ylim=(0, 1.05))
    axes.legend(frameon=False)
    save(figure, out / "lora_cost.svg")


KINDS = {"engine": "#1d4ed8", "replica": "#60a5fa", "router": "#0891b2", "haproxy": "#14b8a6", "serve": "#a3a3a3",
         "ray": "#d4d4d4", "store": "#fbbf24", "peer": PEER}  # fmt: skip


def draw_serving(rows: list[dict[str, Any]], out: Path) -> None:
    """Of each case requests a second, beside the peer's, and the CPU of a request by kind of process."""
    if not rows:
        return
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(2.1 * len(cases) + 4, 3.6))
    for row in rows:
        is_ours = row["server"] == "chorus"
        x = cases.index(row["case"]) + (-0.2 if is_ours else 0.2)
        panels[0].bar(x, row["requests_per_s"]["median"], 0.38, color=OURS if is_ours else PEER)
        bottom = 0.0
        for kind, color in KINDS.items():
            if (figures := row.get(f"cpu_ms_per_request_{kind}")) is not None:
                panels[1].bar(x, figures["median"], 0.38, bottom=bottom, color=color)
                bottom += figures["median"]
    for axes, label in zip(panels, ("requests / s", "ms of CPU a request, all processes"), strict=True):
        axes.set_xticks(range(len(cases)), [case.replace(":", "\n") for case in cases])
        axes.set_ylabel(label)
    panels[1].legend([plt.Rectangle((0, 0), 1, 1, color=color) for color in KINDS.values()], KINDS, frameon=False)
    save(figure, out / "serving.svg")


def save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    rows = read(args.results)
    plt.rcParams["svg.hashsalt"] = "chorus"  # the same bytes for the same data
    draw_comparisons([row for row in rows if "median_ratio" in row], args.out)
    draw_lora_cost([row for row in rows if "share_of_base" in row], args.out)
    draw_serving([row for row in rows if "server" in row], args.out)
    for key, file, draw in FIGURES:
        if chosen := [row for row in rows if key in row]:
            save(draw(chosen), args.out / file)


if __name__ == "__main__":
    main()
