"""A tiny byte-level Llama and LoRA adapters of it: small enough to ship, trained enough to be checked exactly."""
