"""One engine, and the images that it holds leases of."""
