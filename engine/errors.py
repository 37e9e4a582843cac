"""Every error the engine raises on purpose, as one tree. `code` is stable: HTTP, metrics and logs use it.

    EngineError
    ├── ConfigError                 config_invalid           a setting that cannot work, found at start
    ├── ModelNotSupported           model_not_supported      names the layer or feature we cannot serve
    ├── RequestError
    │   ├── InvalidRequest          invalid_request          `param` names the field
    │   ├── PromptTooLong           context_length_exceeded  it could never fit
    │   ├── QueueFull               queue_full               try again later
    │   └── RequestFailed           request_failed           it was running and could not go on
    ├── AdapterError
    │   ├── AdapterImageInvalid     adapter_image_invalid    image and manifest do not fit this engine
    │   └── AdapterTooLarge         adapter_too_large        larger than the whole adapter budget
    └── EngineDead                  engine_dead              fatal: the process must be replaced

A message names the value, the limit and the remedy.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all errors the engine raises on purpose."""

    code = "engine_error"
    retryable = False


class ConfigError(EngineError):
    code = "config_invalid"


class ModelNotSupported(EngineError):
    code = "model_not_supported"


class RequestError(EngineError):
    code = "request_error"


class InvalidRequest(RequestError):
    """A field of a request has a value that is not allowed; `param` is the field's name."""

    code = "invalid_request"

    def __init__(self, param: str, message: str) -> None:
        super().__init__(param, message)
        self.param = param
        self.message = message

    def __str__(self) -> str:
        return f"{self.param}: {self.message}"


class PromptTooLong(RequestError):
    code = "context_length_exceeded"


class QueueFull(RequestError):
    code = "queue_full"
    retryable = True


class RequestFailed(RequestError):
    code = "request_failed"


class AdapterError(EngineError):
    code = "adapter_error"


class AdapterImageInvalid(AdapterError):
    code = "adapter_image_invalid"


class AdapterTooLarge(AdapterError):
    code = "adapter_too_large"


class EngineDead(EngineError):
    code = "engine_dead"
    retryable = True
