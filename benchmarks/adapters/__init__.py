"""What it costs to have more adapters than memory: see `python -m benchmarks.adapters --help`."""
