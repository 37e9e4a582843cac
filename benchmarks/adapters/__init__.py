"""What it costs to have more adapters than memory: see `python -m benchmarks.adapters --help`."""

PLACES = ("host", "host_first_mapped", "disk", "folder", "bucket")
"""Where an adapter can be when it is asked for, from near to far; `benchmarks.adapters.ttft` says what they mean."""
