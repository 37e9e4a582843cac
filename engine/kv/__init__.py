"""The KV cache's pages and the attention backends that read them."""
