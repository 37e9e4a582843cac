"""The kinds of adapter sources that `adapters.sources` may list, and what each may say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic import model_validator as check

SOURCE_NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
CATALOG = "catalog"  # names the source of what was registered by POST /adapters
HTTP_URL = r"^https?://[^/?#]+[^?#]*$"


class Settings(BaseModel):
    """Base of all settings: no unknown names, no conversions of types, no changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("must be the NAME of an environment variable; secrets do not belong into settings")
    return name


def _bundle(verify: bool | str) -> bool | str:
    return verify if isinstance(verify, bool) else str(Path(verify).resolve())


VariableName = Annotated[str, AfterValidator(_variable)]
# A file: certificates of the authorities to trust. False: whatever answers is trusted.
VerifyTls = Annotated[bool | str, AfterValidator(_bundle)]
Checksums = Literal["when_required", "when_supported"]


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
    """A bucket, or a part of one, with one "folder" per adapter. Credentials: boto3's own chain, unless named here."""

    kind: Literal["s3"]
    name: str = Field(default="s3", pattern=SOURCE_NAME)
    bucket: str = Field(min_length=3)
    prefix: str = ""
    endpoint_url: str | None = None  # of an S3-compatible store; None: AWS
    region: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    request_checksums: Checksums = "when_required"  # some S3-compatible stores refuse more
    response_checksums: Checksums = "when_required"
    requester_pays: bool = False
    verify_tls: VerifyTls = True
    access_key_id_env: VariableName | None = None
    secret_access_key_env: VariableName | None = None
    session_token_env: VariableName | None = None

    @check(mode="after")
    def _keys_come_in_pairs(self) -> Self:
        if (self.access_key_id_env is None) != (self.secret_access_key_env is None):
            raise ValueError("access_key_id_env and secret_access_key_env belong together; name both or neither")
        if self.session_token_env is not None and self.access_key_id_env is None:
            raise ValueError("session_token_env belongs to a key; name access_key_id_env and secret_access_key_env too")
        return self


class HttpSource(Settings):
    """A web server with `<base_url>/<name>/<file>` for each adapter. It tells no names: those in use are listed."""

    kind: Literal["http"]
    name: str = Field(default="http", pattern=SOURCE_NAME)
    base_url: str = Field(pattern=HTTP_URL)
    token_env: VariableName | None = None  # sent as a bearer token
    verify_tls: VerifyTls = True
    redirect_hosts: tuple[str, ...] = Field(default=(), strict=False)  # shell patterns, beside its own host


class HubSource(Settings):
    """The Hugging Face Hub, or a server like it: an adapter's name is that of its repository."""

    kind: Literal["hub"]
    name: str = Field(default="hub", pattern=SOURCE_NAME)
    endpoint: str = Field(default="https://huggingface.co", pattern=HTTP_URL)
    revision: str = Field(default="main", min_length=1)  # branch, tag or commit
    repos: tuple[str, ...] | None = Field(default=None, strict=False)  # shell patterns; None: every repository
    token_env: VariableName | None = None
    verify_tls: VerifyTls = True
    redirect_hosts: tuple[str, ...] = Field(default=(), strict=False)  # shell patterns, beside its own host


Source = Annotated[FileSource | S3Source | HttpSource | HubSource, Field(discriminator="kind")]
