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
    for key, file, draw in FIGURES:
        if chosen := [row for row in rows if key in row]:
            save(draw(chosen), args.out / file)


if __name__ == "__main__":
    main()
