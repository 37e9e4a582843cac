"""Quantized base models: what they keep of a trained model's answers, and the memory they take.

    python -m benchmarks.quantized calibration > FILE.jsonl         text to calibrate the demo's base with
    python -m benchmarks.quantized quality --checkpoint awq=FOLDER  exact answers of the demo and all its adapters
    python -m benchmarks.quantized footprint --model MODEL          bytes of a process, while it loads and afterwards

Each prints JSON lines: figures, configuration, hardware, versions and commit. Speed is `benchmarks.compare` of two runs
of `benchmarks.throughput`, one with `--engine '{"quantization": "int4"}'`.
"""

from __future__ import annotations

from benchmarks.programs import run_one

PROGRAMS = ("calibration", "quality", "footprint")

if __name__ == "__main__":
    run_one("benchmarks.quantized", __doc__, PROGRAMS)
