"""What `args` of serve_config.yaml may say. Strict: an unknown name or a wrong type stops the start and is named.

Secrets are never settings: settings name the environment variables that hold them, on every node where a router or a
replica may run.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, PositiveFloat, PositiveInt, create_model, field_validator
from pydantic import model_validator as check

from adapter_store.errors import AdapterNameInvalid
from adapter_store.records import check_name
from deployments.dialects.dialect import REASONING_PARSERS, TOOL_PARSERS
from deployments.settings.sources import CATALOG, Settings, Source, VariableName
from engine.config import MIB, EngineConfig
from engine.errors import ConfigError
from engine.model_folder import find

GIB = 1024 * MIB


def is_allowed(name: str, patterns: tuple[str, ...] | None) -> bool:
    """Whether one of the shell `patterns` has the adapter `name`; None has all."""
    return patterns is None or any(fnmatchcase(name, pattern) for pattern in patterns)


class AdapterSettings(Settings):
    """Where adapters come from and how the store keeps them."""

    sources: tuple[Source, ...] = Field(default=(), strict=False)  # in order: the first that knows a name has it
    allowed: tuple[str, ...] | None = Field(default=None, strict=False)  # shell patterns of names; None: all
    pinned: tuple[str, ...] = Field(default=(), strict=False)  # names that every replica keeps on its device
    warm_bytes: int | None = Field(default=None, ge=0)  # a new replica begins with at most; None: half of its own
    # Packed adapters in host memory (Ray's object store); auto: a sixteenth of the memory where the application is
    # built, at most 1 GiB, and room for one adapter.
    host_bytes: PositiveInt | Literal["auto"] = "auto"
    # Folder of packed adapters and of what was registered; None: those are packed again, that is on the head node only.
    disk_path: str | None = None
    # Processes that the names are spread over, when one fetches too slowly; each has its part of the budgets.
    shards: int = Field(default=1, ge=1, le=64)
    disk_bytes: PositiveInt = 8 * GIB  # packed adapters on disk
    max_adapter_bytes: PositiveInt = 256 * MIB  # of one adapter, as packed; its file may have four times as many
    max_rank: PositiveInt = 512
    # Adapters fetched at a time from each source; None: 4 of a folder, 16 of a bucket, a web server, a hub.
    parallel_fetches: PositiveInt | None = None
    fetch_bytes_per_s: PositiveInt | None = None  # of all downloads together; None: as fast as they go
    niceness: int = Field(default=10, ge=0, le=19)  # of the threads that fetch and pack: 19 runs only when all is idle
    traffic_half_life_s: PositiveFloat = 600.0  # what is kept and warmed goes by requests; one counts half after
    refresh_s: PositiveFloat = 10.0  # a re-uploaded adapter is seen within
    store_wait_s: PositiveFloat = 20.0  # a request waits so long for a restarting store, then 503
    lease_ttl_s: PositiveFloat = 30.0  # a replica that stays silent so long loses its leases
    namespace: str = Field(default="chorus", min_length=1)  # Ray namespace of the store actor
    store_name: str = Field(default="adapter-store", min_length=1)
    url_key_env: VariableName | None = None  # key under which registered URLs are kept; None: a restart forgets those

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources have one name: {names}; give each a name of its own")
        if CATALOG in names:
            raise ValueError(f"{CATALOG!r} is the name of what is registered by POST /adapters; choose another")
        return sources

    @check(mode="after")
    def _shards_hold_an_adapter(self) -> Self:
        if self.shards > 1 and self.host_bytes != "auto" and self.host_bytes < self.shards * self.max_adapter_bytes:
            raise ValueError(
                f"host_bytes: {self.host_bytes} is too little for {self.shards} shards, each of which has room for an "
                f"adapter of max_adapter_bytes ({self.max_adapter_bytes}); give more, or fewer shards"
            )
        return self

    @field_validator("disk_path")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        return None if path is None else str(Path(path).resolve())

    @check(mode="after")
    def _pinned_is_served(self) -> Self:
        for name in self.pinned:
            try:
                check_name(name)
            except AdapterNameInvalid as error:
                raise ValueError(f"pinned: {error}") from error
            if not is_allowed(name, self.allowed):
                raise ValueError(f"pinned: the patterns of `allowed` leave out {name!r}; pin what may be served")
        return self

    def host_bytes_in(self, memory_bytes: int) -> int:
        """host_bytes, on a node of so much memory."""
        if self.host_bytes != "auto":
            return self.host_bytes
        return max(self.shards * self.max_adapter_bytes, min(GIB, memory_bytes // 16))

    @property
    def source_kinds(self) -> dict[str, str]:
        """What a request's adapter_source may say, and of what kind each source is."""
        return {CATALOG: CATALOG} | {source.name: source.kind for source in self.sources}


class LimitSettings(Settings):
    """What one HTTP request may ask for."""

    max_body_bytes: PositiveInt = 4 * MIB
    max_prompt_bytes: PositiveInt = MIB  # text of one prompt or conversation
    max_prompt_ids: PositiveInt = 2**18  # token ids in all prompts that are sent as such
    max_prompts: PositiveInt = 64  # in a list of prompts
    max_inputs: PositiveInt = 2048  # in a list of texts to embed, to score or to rank
    max_samples: PositiveInt = 128  # prompts times n


class ResponseSettings(Settings):
    """What POST /v1/responses keeps for `previous_response_id`, in memory: all routers together."""

    max_bytes: PositiveInt = 64 * MIB
    max_bytes_per_key: PositiveInt = 16 * MIB  # of one API key; what was used longest ago goes first
    max_age_s: PositiveFloat = 3600.0


def _origin(text: str) -> str:
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s,*]+", text):
        raise ValueError(f"{text!r} is no origin; write scheme, host and port as browsers do, or '*' for all")
    return text


Origin = Annotated[str, AfterValidator(_origin)]


def _engine_settings() -> type[BaseModel]:
    """A model of EngineConfig's fields without `model`, which is a setting of its own."""
    hints = typing.get_type_hints(EngineConfig)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], field.default)
        for field in dataclasses.fields(EngineConfig)
        if field.name != "model"
    }
    return create_model("EngineSettings", __base__=Settings, **fields)


_EngineSettings = _engine_settings()


class AppArgs(Settings):
    """The arguments of `deployments.app:build`."""

    model: str  # folder with a transformers checkpoint
    # Name of the base in the API; not given: that of its folder, with hyphens for what a name may not have.
    model_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=200)
    engine: dict[str, Any] = Field(default_factory=dict)  # fields of EngineConfig
    num_replicas: PositiveInt = 1
    num_routers: PositiveInt = 1
    # Replicas answer HTTP themselves, behind a gateway of your own: no routers, no placement, no resumed streams.
    direct: bool = False
    replica_num_cpus: float = Field(default=1.0, ge=0.0)
    replica_num_gpus: float = Field(default=0.0, ge=0.0)
    router_num_cpus: float = Field(default=0.25, ge=0.0)
    adapters: AdapterSettings = AdapterSettings()
    limits: LimitSettings = LimitSettings()
    responses: ResponseSettings = ResponseSettings()
    # Of sampling, where a request gives none: what the model's generation_config.json says, or OpenAI's.
    generation_config: Literal["auto", "none"] = "auto"
    # Web pages that may ask from a browser: their origins, or "*" for all. None: those of the browser's own machine.
    cors: tuple[Origin, ...] | None = Field(default=None, strict=False)
    api_keys_env: VariableName | None = None  # variable with comma-separated keys; None: who reaches the port may ask
    # Keys that may change adapters. None: nobody; without api_keys_env and on a loopback address, who reaches the port.
    admin_keys_env: VariableName | None = None
    open: bool = False  # without api_keys_env: listen where others reach the port all the same
    replica_wait_s: PositiveFloat = 60.0  # a request waits so long for a replica to take it, then 503
    # How the model writes calls of tools and reasoning; auto: what its chat template says. docs/tools.md lists them.
    tool_parser: Literal[TOOL_PARSERS] = "auto"  # type: ignore[valid-type]
    reasoning_parser: Literal[REASONING_PARSERS] = "auto"  # type: ignore[valid-type]
    max_resumes: int = Field(default=8, ge=0)  # an answer moves so often; replicas that were stopped are not counted
    drain_s: PositiveFloat = 300.0  # a stopping replica finishes its streams within

    @check(mode="before")
    @classmethod
    def _named_after_its_folder(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("model"), str) or data.get("model_id") is not None:
            return data
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data["model"]).resolve().name).lstrip("._-")
        return data | {"model_id": name[:200] or "base"}

    @field_validator("model")
    @classmethod
    def _absolute(cls, model: str) -> str:
        try:
            return str(find(model).resolve())
        except ConfigError as error:
            raise ValueError(str(error)) from error

    @check(mode="after")
    def _engine_is_valid(self) -> Self:
        _EngineSettings.model_validate(self.engine)
        try:
            self.engine_config().validate()
        except ConfigError as error:
            raise ValueError(f"engine: {error}") from error
        return self

    @check(mode="after")
    def _base_is_no_adapter(self) -> Self:
        if self.model_id in self.adapters.pinned:
            raise ValueError(f"adapters.pinned: {self.model_id!r} is the base's model_id, which no adapter can have")
        return self

    @check(mode="after")
    def _is_open_or_has_keys(self) -> Self:
        if self.open and self.api_keys_env is not None:
            raise ValueError("open: true says that everyone may ask, api_keys_env that a key is needed; leave one out")
        return self

    def warm_bytes(self, adapter_bytes: int) -> int:
        """How many bytes of adapters a new replica that keeps `adapter_bytes` brings in before anybody asks."""
        given = self.adapters.warm_bytes
        return adapter_bytes // 2 if given is None else given

    def on_a_machine_of(self, memory_bytes: int) -> Self:
        """With host_bytes as a number: the same for all who may make the store."""
        adapters = self.adapters.model_copy(update={"host_bytes": self.adapters.host_bytes_in(memory_bytes)})
        return self.model_copy(update={"adapters": adapters})

    @property
    def host_bytes(self) -> int:
        return self.adapters.host_bytes_in(16 * GIB)

    @property
    def store_bytes_of_a_replica(self) -> int:
        """What each replica may hold leases on in the store, so that one more adapter still finds room there."""
        largest = self.adapters.max_adapter_bytes
        return max(largest, (self.host_bytes - self.adapters.shards * largest) // self.num_replicas)

    def engine_config(self) -> EngineConfig:
        """The engine's settings, paths absolute."""
        fields = dict(self.engine)
        if fields.get("tokenizer") is not None:
            fields["tokenizer"] = str(Path(fields["tokenizer"]).resolve())
        return EngineConfig(model=self.model, **fields)
