"""What `args` of serve_config.yaml may say. Strict: an unknown name or a wrong type stops the start and is named.

Secrets are never settings: API keys come from an environment variable that is named here, S3 credentials from the
default chain (environment, profile, instance role).
"""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, create_model, field_validator
from pydantic import model_validator as check

from engine.config import MIB, EngineConfig
from engine.errors import ConfigError

GIB = 1024 * MIB
SOURCE_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class Settings(BaseModel):
    """Base of all settings: no unknown names, no conversions of types, no changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileSource(Settings):
    """A folder with one folder per adapter."""

    kind: Literal["file"]
    name: str = Field(default="local", pattern=SOURCE_NAME)  # what a request's adapter_source may say
    path: str

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        return str(Path(path).resolve())


class S3Source(Settings):
    """A bucket, or a part of one, with one "folder" per adapter."""

    kind: Literal["s3"]
    name: str = Field(default="s3", pattern=SOURCE_NAME)
    bucket: str = Field(min_length=3)
    prefix: str = ""
    endpoint_url: str | None = None  # of an S3-compatible store; None: AWS
    region: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"


Source = Annotated[FileSource | S3Source, Field(discriminator="kind")]


class AdapterSettings(Settings):
    """Where adapters come from and how the store keeps them."""

    sources: tuple[Source, ...] = Field(default=(), strict=False)  # in order: the first that knows a name has it
    allowed: tuple[str, ...] | None = Field(default=None, strict=False)  # shell patterns of names; None: all
    host_bytes: PositiveInt = GIB  # packed adapters in host memory (Ray's object store)
    max_adapter_bytes: PositiveInt = 256 * MIB  # of one adapter, as uploaded and as packed
    max_rank: PositiveInt = 512
    refresh_s: PositiveFloat = 10.0  # a re-uploaded adapter is seen within
    store_wait_s: PositiveFloat = 20.0  # a request waits so long for a restarting store, then 503
    lease_ttl_s: PositiveFloat = 30.0  # a replica that stays silent so long loses its leases
    namespace: str = Field(default="chorus", min_length=1)  # Ray namespace of the store actor
    store_name: str = Field(default="adapter-store", min_length=1)

    @field_validator("sources")
    @classmethod
    def _distinct(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError(f"two sources have one name: {names}; give each a name of its own")
        return sources

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(source.name for source in self.sources)


class LimitSettings(Settings):
    """What one HTTP request may ask for."""

    max_body_bytes: PositiveInt = 4 * MIB
    max_prompt_bytes: PositiveInt = MIB  # text of one prompt or conversation
    max_prompts: PositiveInt = 64  # in a list of prompts
    max_samples: PositiveInt = 128  # prompts times n


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
    model_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=200)  # name of the base in the API
    engine: dict[str, Any] = {}  # fields of EngineConfig
    num_replicas: PositiveInt = 1
    num_routers: PositiveInt = 1
    replica_num_cpus: float = Field(default=1.0, ge=0.0)
    replica_num_gpus: float = Field(default=0.0, ge=0.0)
    router_num_cpus: float = Field(default=0.25, ge=0.0)
    adapters: AdapterSettings = AdapterSettings()
    limits: LimitSettings = LimitSettings()
    api_keys_env: str | None = None  # variable with comma-separated keys; None: anyone may ask
    replica_wait_s: PositiveFloat = 60.0  # a request waits so long for a replica to take it, then 503
    max_resumes: int = Field(default=8, ge=0)  # an answer moves to another replica so often
    drain_s: PositiveFloat = 300.0  # a stopping replica finishes its streams within

    @field_validator("model")
    @classmethod
    def _absolute(cls, model: str) -> str:
        if not Path(model).is_dir():
            raise ValueError(f"model folder {model!r} does not exist under {str(Path.cwd())!r}")
        return str(Path(model).resolve())

    @field_validator("api_keys_env")
    @classmethod
    def _variable_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("must be the NAME of an environment variable; keys do not belong into settings")
        return name

    @check(mode="after")
    def _engine_is_valid(self) -> Self:
        _EngineSettings.model_validate(self.engine)
        try:
            self.engine_config().validate()
        except ConfigError as error:
            raise ValueError(f"engine: {error}") from error
        return self

    def engine_config(self) -> EngineConfig:
        """The engine's settings, paths absolute."""
        fields = dict(self.engine)
        if fields.get("tokenizer") is not None:
            fields["tokenizer"] = str(Path(fields["tokenizer"]).resolve())
        return EngineConfig(model=self.model, **fields)
