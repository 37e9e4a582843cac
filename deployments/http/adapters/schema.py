"""Bodies of the adapters API."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, RootModel, Tag

from adapter_store.records import MAX_NAME_CHARS, Registration
from deployments.http import limits
from deployments.http.adapters import examples
from deployments.http.wire import Body, wrong

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Url = Annotated[str, Field(pattern=r"^https?://[^/]", max_length=limits.MAX_URL_CHARS)]
_Name = Annotated[str, Field(max_length=MAX_NAME_CHARS)]  # what names may hold is the store's to say
_SourceName = Annotated[str, Field(max_length=limits.MAX_SOURCE_CHARS)]


def _few(files: Any) -> Any:
    if isinstance(files, dict) and len(files) > limits.MAX_FILES:
        raise wrong(f"{len(files)} files, the limit is {limits.MAX_FILES}; an adapter has two")
    return files


_FEW = BeforeValidator(_few)  # before its items are looked at


class NamedRequest(Body):
    """An adapter; without `source`, the one that requests for the name are answered by."""

    model_config = ConfigDict(json_schema_extra={"example": examples.NAMED})

    name: _Name
    source: _SourceName | None = None


class Row(Body):
    """An adapter to be registered: `name` stands for what `source` has at `location`, or for the files at `urls`."""

    name: _Name
    source: _SourceName
    location: Annotated[str, Field(max_length=limits.MAX_LOCATION_CHARS)] = ""
    urls: Annotated[dict[_Name, _Url], _FEW, Field(default_factory=dict)]
    sha256: Annotated[dict[_Name, _Digest], _FEW, Field(default_factory=dict)]

    def registration(self) -> Registration:
        """As the store takes it."""
        return Registration(
            name=self.name,
            source=self.source,
            location=self.location,
            urls=tuple(sorted(self.urls.items())),
            sha256=tuple(sorted(self.sha256.items())),
        )


def _shape(value: Any) -> str:
    return "list" if isinstance(value, list) else "dict"


_Rows = Annotated[list[Row], Field(min_length=1, max_length=limits.MAX_ROWS, fail_fast=True)]


class RegisterRequest(
    RootModel[Annotated[Annotated[Row, Tag("dict")] | Annotated[_Rows, Tag("list")], Discriminator(_shape)]]
):
    """One adapter, or a list of them."""

    model_config = ConfigDict(json_schema_extra={"example": examples.REGISTER})

    @property
    def rows(self) -> list[Row]:
        """The adapters, whichever way they came."""
        return [self.root] if isinstance(self.root, Row) else self.root
