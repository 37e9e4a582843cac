"""What the wire models of all APIs share: strict bodies, and fields that are refused by name unless neutral."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Body(BaseModel):
    """A JSON object of a request: unknown fields and wrong types are refused, never ignored or converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


@dataclass(frozen=True, slots=True)
class _Refused:
    reason: str
    neutral: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.neutral], "description": f"Not supported: {self.reason}."}

    def _check(self, value: object) -> object:
        if value is None or any(type(value) is type(other) and value == other for other in self.neutral):
            return value
        raise PydanticCustomError("unsupported_parameter", "{reason}", {"reason": f"not supported: {self.reason}"})


def refused(reason: str, *neutral: object) -> _Refused:
    """Marks a field that is not served: only null and the `neutral` values, which ask for nothing, pass."""
    return _Refused(reason, neutral)
