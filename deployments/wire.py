"""What the wire models of all APIs share: strict bodies, and fields that are refused by name unless neutral."""

from __future__ import annotations

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Body(BaseModel):
    """A JSON object of a request: unknown fields and wrong types are refused, never ignored or converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


def refused(reason: str, *neutral: object) -> AfterValidator:
    """Marks a field that is not served: only null and the `neutral` values, which ask for nothing, pass."""

    def check(value: object) -> object:
        if value is None or any(type(value) is type(other) and value == other for other in neutral):
            return value
        raise PydanticCustomError("unsupported_parameter", "{reason}", {"reason": f"not supported: {reason}"})

    return AfterValidator(check)
