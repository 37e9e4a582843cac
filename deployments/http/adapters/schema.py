"""Bodies of the adapters API."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, RootModel, Tag

from adapter_store.records import Registration
from deployments.http.adapters import examples
from deployments.http.wire import Body

MAX_ROWS = 1000
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Url = Annotated[str, Field(pattern=r"^https?://[^/]", max_length=4000)]


class NamedRequest(Body):
    """An adapter; without `source`, the one that requests for the name are answered by."""

    model_config = ConfigDict(json_schema_extra={"example": examples.NAMED})

    name: str
    source: str | None = None


class Row(Body):
    """An adapter to be registered: `name` stands for what `source` has at `location`, or for the files at `urls`."""

    name: str
    source: str
    location: Annotated[str, Field(max_length=1000)] = ""
    urls: Annotated[dict[str, _Url], Field(max_length=16, default_factory=dict)]
    sha256: Annotated[dict[str, _Digest], Field(max_length=16, default_factory=dict)]

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


_Rows = Annotated[list[Row], Field(min_length=1, max_length=MAX_ROWS)]


class RegisterRequest(
    RootModel[Annotated[Annotated[Row, Tag("dict")] | Annotated[_Rows, Tag("list")], Discriminator(_shape)]]
):
    """One adapter, or a list of them."""

    model_config = ConfigDict(json_schema_extra={"example": examples.REGISTER})

    @property
    def rows(self) -> list[Row]:
        """The adapters, whichever way they came."""
        return [self.root] if isinstance(self.root, Row) else self.root
