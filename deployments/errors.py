"""The one table from error codes to HTTP: of the engine, of the adapter store and of this layer.

`ANSWERS` has a row for each `code` of `engine.errors`, `adapter_store.errors` and `deployments` itself; a test
enumerates the classes. An unknown code answers as `internal_error`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from adapter_store.errors import StoreError
from deployments.calls import Fault, Refused
from engine.errors import EngineError, InvalidRequest


@dataclass(frozen=True, slots=True)
class Answer:
    """How one error code is told. OpenAI and LoRAX name the kinds of errors differently, and so their statuses."""

    status: int  # of the OpenAI paths and our own
    openai_type: str
    lorax_status: int
    lorax_type: str
    openai_code: str | None = None  # None: our own code
    retry_after_s: int | None = None


def _wrong(status: int, *, lorax_status: int = 422, openai_code: str | None = None) -> Answer:
    return Answer(status, "invalid_request_error", lorax_status, "validation", openai_code)


def _adapter(status: int, openai_code: str | None = None) -> Answer:
    # LoRAX answers every failure of an adapter with 424 "generation".
    return Answer(status, "invalid_request_error", 424, "generation", openai_code)


def _broken(lorax_type: str = "generation") -> Answer:
    return Answer(500, "server_error", 500, lorax_type)


def _later(status: int, retry_after_s: int, kind: str, lorax_type: str) -> Answer:
    return Answer(status, kind, status, lorax_type, retry_after_s=retry_after_s)


ANSWERS: Mapping[str, Answer] = MappingProxyType(
    {
        # The request.
        "invalid_api_key": Answer(401, "authentication_error", 401, "authentication"),
        "admin_key_required": Answer(403, "permission_error", 403, "authentication"),
        "cross_origin": Answer(403, "permission_error", 403, "authentication"),
        "invalid_request": _wrong(400),
        "request_error": _wrong(400),
        "unsupported_parameter": _wrong(400),
        "unknown_parameter": _wrong(400),
        "context_length_exceeded": _wrong(400),
        "body_too_large": _wrong(413, lorax_status=413),
        "prompt_too_large": _wrong(413, lorax_status=413),
        "not_found": _wrong(404, lorax_status=404),
        "response_not_found": _wrong(404, lorax_status=404),
        "method_not_allowed": _wrong(405, lorax_status=405),
        "unsupported_media_type": _wrong(415, lorax_status=415),
        # It ended the process that worked on it, several times. Not a 5xx: clients would send it again by themselves.
        "request_ends_replicas": _wrong(422),
        # The adapter.
        "model_not_found": _adapter(404),
        "adapter_not_found": _adapter(404, "model_not_found"),
        "adapter_name_invalid": _wrong(400),
        "adapter_rejected": _adapter(422),
        "adapter_too_large": _adapter(422),
        "adapter_version_gone": _adapter(409),
        "source_unknown": _wrong(400),
        "registration_invalid": _wrong(400),
        "pin_refused": _adapter(409),
        # Load.
        "queue_full": _later(429, 1, "rate_limit_error", "overloaded"),
        # Parts that are away, and come back.
        "store_full": _later(503, 2, "server_error", "generation"),
        "store_unavailable": _later(503, 5, "server_error", "generation"),
        "source_unavailable": _later(503, 5, "server_error", "generation"),
        "kept_unavailable": _later(503, 5, "server_error", "generation"),
        "spec_unknown": _later(503, 1, "server_error", "generation"),
        "engine_dead": _later(503, 2, "server_error", "incomplete_generation"),
        "no_replica": _later(503, 5, "server_error", "incomplete_generation"),
        "replica_stopped": _later(503, 2, "server_error", "incomplete_generation"),
        "replica_reserved": _later(503, 5, "server_error", "incomplete_generation"),
        "replica_overloaded": _later(503, 2, "server_error", "overloaded"),
        "request_cancelled": _later(503, 1, "server_error", "incomplete_generation"),
        "replica_lost": _later(503, 2, "server_error", "incomplete_generation"),
        # Our own mistakes.
        "internal_error": _broken(),
        "engine_error": _broken(),
        "config_invalid": _broken(),
        "model_not_supported": _broken(),
        "request_failed": _broken("incomplete_generation"),
        "adapter_error": _broken(),
        "adapter_image_invalid": _broken(),
        "store_error": _broken(),
        "spec_invalid": _broken(),
        "store_config_invalid": _broken(),
    }
)


def answer_for(code: str) -> Answer:
    """The row of `code`."""
    return ANSWERS.get(code, ANSWERS["internal_error"])


def fault_of(error: Exception) -> Fault:
    """`error` as data. What is neither ours, the engine's nor the store's is an `internal_error` without details."""
    if isinstance(error, Refused):
        return error.fault
    if isinstance(error, InvalidRequest):
        return Fault(code=error.code, message=str(error), param=error.param)
    if isinstance(error, EngineError | StoreError):
        return Fault(code=error.code, message=str(error))
    return Fault(code="internal_error", message=f"{type(error).__name__} in the server; its log says more")
