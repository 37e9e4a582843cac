"""Other engines on the workloads of `benchmarks.throughput`. Each runs in an environment of its own."""
