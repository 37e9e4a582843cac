"""Every error the adapter store raises on purpose, as one tree. `code` is stable: HTTP, metrics and logs use it.

    StoreError
    ├── AdapterNameInvalid      adapter_name_invalid    the name itself can never be an adapter (path traversal, length)
    ├── AdapterNotFound         adapter_not_found       no source has an adapter of this name
    ├── AdapterVersionGone      adapter_version_gone    the asked version was replaced and is no longer on the host
    ├── AdapterRejected         adapter_rejected        its files are broken or ask for what is not implemented
    ├── AdapterTooLarge         adapter_too_large       more bytes than one adapter may have
    ├── SourceUnavailable       source_unavailable      a source did not answer, or refused; try again
    ├── SourceUnknown           source_unknown          the caller named a source that is not configured
    ├── SpecUnknown             spec_unknown            the caller must register its image spec first (after a restart)
    ├── SpecInvalid             spec_invalid            an image spec that images cannot be packed for
    ├── StoreFull               store_full              every byte of the host budget is leased; try again
    ├── RegistrationInvalid     registration_invalid    a row that can never be served; no row of its call was written
    ├── PinRefused              pin_refused             pins would take more than half of the host budget
    └── StoreConfigInvalid      store_config_invalid    a setting that cannot work, found at start

A message names the value, the limit and the remedy. Errors travel between processes: they pickle with their fields.
"""

from __future__ import annotations

from typing import Any

_MAX_REASON_CHARS = 1000


def _rebuild(cls: type[StoreError], message: str, fields: dict[str, Any]) -> StoreError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(fields)
    return error


def printable(text: str, max_chars: int) -> str:
    """`text`, at most so long, with escapes for all that is no printable character: line ends, colours, half pairs."""
    cut = text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."
    return cut if cut.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in cut)


class StoreError(Exception):
    """Base of all errors the store raises on purpose."""

    code = "store_error"
    retryable = False

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.__dict__.update(fields)

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call `cls(message)`, which no subclass with fields of its own accepts.
        return _rebuild, (type(self), str(self), dict(self.__dict__))


class AdapterNameInvalid(StoreError):
    """The name breaks the rules of adapter names; no source is asked."""

    code = "adapter_name_invalid"
    name: str
    reason: str

    def __init__(self, name: str, reason: str) -> None:
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        super().__init__(f"{shown!r} is not an adapter name: {reason}", name=name, reason=reason)


class AdapterNotFound(StoreError):
    """No source has it."""

    code = "adapter_not_found"
    name: str

    def __init__(self, name: str, sources: tuple[str, ...]) -> None:
        where = ", ".join(sources) or "none configured"
        super().__init__(
            f"adapter {name!r} was not found in the sources ({where}); an adapter is a folder of that name with "
            "adapter_config.json and adapter_model.safetensors (of a training run, name one of its checkpoints: "
            "name/checkpoint-500)",
            name=name,
            sources=sources,
        )


class AdapterVersionGone(StoreError):
    """The version is neither the current one of the name nor still on the host."""

    code = "adapter_version_gone"
    name: str
    version: str

    def __init__(self, name: str, version: str) -> None:
        super().__init__(
            f"version {version[:12]} of adapter {name!r} was replaced and is no longer held; "
            "start again with the current version",
            name=name,
            version=version,
        )


class AdapterRejected(StoreError):
    """The adapter was looked at and refused; `reason` is the first thing that is wrong, with its remedy."""

    code = "adapter_rejected"
    name: str
    reason: str
    is_own_digest: bool  # what is wrong is that its content has another digest than this project knows

    def __init__(self, reason: str, name: str = "", *, is_own_digest: bool = False) -> None:
        # What is wrong is told in a stranger's words: they are cut, and what cannot be printed is escaped.
        reason = printable(reason, _MAX_REASON_CHARS)
        prefix = f"adapter {name!r} was refused: " if name else "the adapter was refused: "
        super().__init__(prefix + reason, name=name, reason=reason, is_own_digest=is_own_digest)

    def named(self, name: str) -> AdapterRejected:
        """The same refusal, told of the adapter `name`."""
        return AdapterRejected(self.reason, name, is_own_digest=self.is_own_digest)


class AdapterTooLarge(StoreError):
    """More bytes than one adapter may have."""

    code = "adapter_too_large"
    name: str
    num_bytes: int
    limit_bytes: int

    def __init__(
        self, what: str, num_bytes: int, limit_bytes: int, name: str = "", *, setting: str = "the limit"
    ) -> None:
        subject = f"adapter {name!r}: " if name else ""
        super().__init__(
            f"{subject}{what} has {num_bytes} bytes, the limit is {limit_bytes}; lower its rank or raise {setting}",
            what=what,
            num_bytes=num_bytes,
            limit_bytes=limit_bytes,
            name=name,
            setting=setting,
        )

    def named(self, name: str) -> AdapterTooLarge:
        """The same refusal, told of the adapter `name`."""
        told = self.__dict__
        return AdapterTooLarge(told["what"], self.num_bytes, self.limit_bytes, name, setting=told["setting"])


class SourceUnavailable(StoreError):
    """A source did not answer or would not let us in: nothing is known about the adapter."""

    code = "source_unavailable"
    retryable = True
    source: str
    reason: str

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"adapter source {source!r} is unavailable: {reason}", source=source, reason=reason)


class SourceUnknown(StoreError):
    """A source name that is not configured."""

    code = "source_unknown"
    source: str

    def __init__(self, source: str, known: tuple[str, ...]) -> None:
        super().__init__(
            f"no adapter source is named {source!r}; configured: {', '.join(known) or 'none'}",
            source=source,
            known=known,
        )


class SpecUnknown(StoreError):
    """The store does not (or, after a restart, no longer) know this image spec."""

    code = "spec_unknown"
    retryable = True
    spec_digest: str

    def __init__(self, spec_digest: str) -> None:
        super().__init__(
            f"image spec {spec_digest[:12]} is not registered; call register_spec and ask again",
            spec_digest=spec_digest,
        )


class SpecInvalid(StoreError):
    """An image spec that images cannot be packed for."""

    code = "spec_invalid"
    reason: str

    def __init__(self, reason: str) -> None:
        super().__init__(f"the image spec cannot be packed for: {reason}", reason=reason)


class StoreFull(StoreError):
    """Leases hold the whole host budget."""

    code = "store_full"
    retryable = True
    num_bytes: int
    budget_bytes: int

    def __init__(self, num_bytes: int, held_bytes: int, budget_bytes: int) -> None:
        super().__init__(
            f"no room for {num_bytes} bytes: {held_bytes} of the host budget of {budget_bytes} bytes are leased; "
            "try again when replicas release adapters, or raise host_bytes",
            num_bytes=num_bytes,
            held_bytes=held_bytes,
            budget_bytes=budget_bytes,
        )


class RegistrationInvalid(StoreError):
    """A row of the catalog that can never be served. None of the rows that came with it was written."""

    code = "registration_invalid"
    name: str
    reason: str

    def __init__(self, name: str, reason: str) -> None:
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        super().__init__(f"adapter {shown!r} cannot be registered: {reason}", name=name, reason=reason)


class PinRefused(StoreError):
    """Pinned adapters may take half of the host budget; this one would take more."""

    code = "pin_refused"
    name: str
    num_bytes: int
    limit_bytes: int

    def __init__(self, name: str, num_bytes: int, pinned_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"adapter {name!r} cannot be pinned: its {num_bytes} bytes and the {pinned_bytes} that are pinned already "
            f"are more than {limit_bytes}, half of host_bytes; unpin another one or raise host_bytes",
            name=name,
            num_bytes=num_bytes,
            pinned_bytes=pinned_bytes,
            limit_bytes=limit_bytes,
        )


class StoreConfigInvalid(StoreError):
    """A setting that cannot work."""

    code = "store_config_invalid"
    field: str

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}", field=field, reason=reason)
