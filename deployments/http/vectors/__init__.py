"""Vectors of texts, and what is made of them: /v1/embeddings, /pooling, scores and rankings."""
