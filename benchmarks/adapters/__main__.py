"""Adapters on their way from a bucket to the engine: what a cold one costs, and whom.

    python -m benchmarks.adapters ttft --model MODEL --rank 16          first token, by where the adapter was
    python -m benchmarks.adapters interference --model MODEL            what others notice of adapters being loaded
    python -m benchmarks.adapters traffic                               hit rates, beside plain LRU
    python -m benchmarks.adapters lookup --names 1000,1000000           what a registered name costs
    python -m benchmarks.adapters singleflight                          how often one adapter is read for many requests
    python -m benchmarks.adapters cold --shards 1,4                     new adapters a second, and the CPU of each
    python -m benchmarks.adapters hostile                               what a hostile adapter costs others

Each prints JSON lines: figures, configuration, hardware, versions and commit.
"""

from __future__ import annotations

from benchmarks.programs import run_one

PROGRAMS = ("ttft", "interference", "traffic", "lookup", "singleflight", "cold", "hostile")

if __name__ == "__main__":
    run_one("benchmarks.adapters", __doc__, PROGRAMS)
