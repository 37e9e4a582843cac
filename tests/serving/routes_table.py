"""Every route of the application, and who may ask it."""

from __future__ import annotations

from typing import Any

OPEN, ASK, CHANGE = "open to everyone", "for those who may ask", "changes what is served"
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
NAMED = {"name": "alpha"}
# Every route of the application: what it is, a path of it, and a body that it takes. A new route has its place here.
ROUTES: dict[tuple[str, str], tuple[str, str, Any]] = {
    ("GET", "/health"): (OPEN, "/health", None),
    ("GET", "/docs"): (OPEN, "/docs", None),
    ("GET", "/docs/oauth2-redirect"): (OPEN, "/docs/oauth2-redirect", None),
    ("GET", "/openapi.json"): (OPEN, "/openapi.json", None),
    ("GET", "/docs/files"): (OPEN, "/docs/files/swagger-ui.css", None),
    ("GET", "/stats"): (ASK, "/stats", None),
    ("GET", "/v1/models"): (ASK, "/v1/models", None),
    ("GET", "/v1/models/{model:path}"): (ASK, "/v1/models/demo", None),
    ("POST", "/v1/chat/completions"): (ASK, "/v1/chat/completions", CHAT),
    ("POST", "/v1/completions"): (ASK, "/v1/completions", {"model": "demo", "prompt": "x\n"}),
    ("POST", "/v1/responses"): (ASK, "/v1/responses", {"model": "demo", "input": "x"}),
    ("GET", "/v1/responses/{response_id}"): (ASK, "/v1/responses/resp_1", None),
    ("DELETE", "/v1/responses/{response_id}"): (ASK, "/v1/responses/resp_1", None),
    ("GET", "/v1/responses/{response_id}/input_items"): (ASK, "/v1/responses/resp_1/input_items", None),
    ("POST", "/v1/messages"): (ASK, "/v1/messages", CHAT | {"max_tokens": 9}),
    ("POST", "/v1/messages/count_tokens"): (ASK, "/v1/messages/count_tokens", CHAT),
    ("POST", "/v1/decisions"): (
        ASK,
        "/v1/decisions",
        {"model": "demo", "input": "x", "questions": [{"type": "predicate", "instructions": "y"}]},
    ),
    ("POST", "/v1/embeddings"): (ASK, "/v1/embeddings", {"model": "demo", "input": "x"}),
    ("POST", "/pooling"): (ASK, "/pooling", {"model": "demo", "input": "x"}),
    **{
        ("POST", path): (ASK, path, {"model": "demo", "text_1": "x", "text_2": "y"}) for path in ("/v1/score", "/score")
    },
    **{
        ("POST", path): (ASK, path, {"model": "demo", "query": "x", "documents": ["y"]})
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    },
    ("POST", "/embed"): (ASK, "/embed", {"inputs": "x"}),
    ("POST", "/"): (ASK, "/", {"inputs": "x\n"}),
    ("POST", "/generate"): (ASK, "/generate", {"inputs": "x\n"}),
    ("POST", "/generate_stream"): (ASK, "/generate_stream", {"inputs": "x\n"}),
    ("POST", "/tokenize"): (ASK, "/tokenize", {"inputs": "x"}),
    ("POST", "/detokenize"): (ASK, "/detokenize", {"tokens": [65]}),
    **{("GET", path): (ASK, path, None) for path in ("/tokenizer_info", "/version", "/load", "/ping", "/metrics")},
    ("POST", "/ping"): (ASK, "/ping", None),
    ("POST", "/classify"): (ASK, "/classify", {"inputs": "x"}),
    ("POST", "/classify_batch"): (ASK, "/classify_batch", {"inputs": ["x"]}),
    ("GET", "/"): (ASK, "/", None),
    ("GET", "/info"): (ASK, "/info", None),
    ("GET", "/startup"): (OPEN, "/startup", None),
    ("GET", "/adapters"): (ASK, "/adapters", None),
    ("POST", "/adapters"): (CHANGE, "/adapters", {"name": "shout", "source": "local", "location": "upper"}),
    ("DELETE", "/adapters/{name:path}"): (CHANGE, "/adapters/shout", None),
    **{
        ("POST", f"/adapters/{action}"): (CHANGE, f"/adapters/{action}", NAMED)
        for action in ("refresh", "prefetch", "pin", "unpin")
    },
}
