"""API keys: who may ask, and on whose account."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from dataclasses import dataclass

from deployments.calls import Fault, Refused
from deployments.http.origin import is_loopback

logger = logging.getLogger("ray.serve")

MIN_KEY_CHARS = 16


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `tenant` is a short digest of the key, "" where none is needed."""

    tenant: str
    may_change: bool  # what is served
    has_admin_key: bool = False  # else what may be changed is so by the server's address


class ApiKeys:
    """The accepted keys, kept as digests. An admin key is accepted wherever a key is, and may change adapters.

    Without keys everyone may ask. Without keys of either kind everyone may change adapters as well if `is_local`: the
    server listens on a loopback address.
    """

    def __init__(self, keys: tuple[str, ...] = (), admin_keys: tuple[str, ...] = (), *, is_local: bool = False) -> None:
        self._digests = tuple(_digest(key) for key in keys)
        self._admin_digests = tuple(_digest(key) for key in admin_keys)
        self._is_local = is_local

    @classmethod
    def from_env(
        cls, name: str | None, admin_name: str | None = None, *, host: str | None = None, is_open: bool = False
    ) -> ApiKeys:
        """Keys of the environment variables `name` and `admin_name`, separated by commas.

        `host` is what the server listens on; None, not known, counts as an address that others reach.

        Raises: ValueError when a variable is missing or a key is short, or when others reach a server without keys that
        is not said to be open: a typo must not open the server.
        """
        check_closed(name, host, is_open=is_open)
        if name is None:
            logger.warning("api_keys_env is not set: everyone who reaches %s may use this server", host)
        return cls(_read("api_keys_env", name), _read("admin_keys_env", admin_name), is_local=is_loopback(host))

    def caller(self, authorization: str | None) -> Caller:
        """Raises: Refused (`invalid_api_key`).

        All keys are compared, each in constant time, so that the answer's time tells nothing.
        """
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        is_bearer = scheme.lower() == "bearer"
        matches, admin_matches = (
            [hmac.compare_digest(digest, known) for known in digests]
            for digests in (self._digests, self._admin_digests)
        )
        is_admin = is_bearer and any(admin_matches)
        if is_admin or (is_bearer and any(matches)):
            return Caller(digest.hex()[:12], is_admin, is_admin)
        if not self._digests:
            return Caller("", self._is_local and not self._admin_digests)
        problem = "no API key was given" if not key else "the API key is not known"
        raise Refused(Fault(code="invalid_api_key", message=f"{problem}; send 'Authorization: Bearer <key>'"))


def check_closed(name: str | None, host: str | None, *, is_open: bool) -> None:
    """Raises: ValueError when others reach a server without keys (`name` None) that is not `is_open`."""
    if name is None and not is_open and not is_loopback(host):
        where = f"http_options.host is {host!r}" if host is not None else "the HTTP address is not known"
        raise ValueError(
            f"{where}, which others may reach, and api_keys_env is not set: set api_keys_env to the name of an "
            "environment variable with keys; or http_options.host: 127.0.0.1; or, if everyone who reaches it may use "
            "this server, open: true"
        )


def _read(setting: str, name: str | None) -> tuple[str, ...]:
    if name is None:
        return ()
    keys = tuple(key.strip() for key in os.environ.get(name, "").split(",") if key.strip())
    if not keys:
        raise ValueError(f"{setting} names {name!r}, but that environment variable holds no key; set it")
    if any(len(key) < MIN_KEY_CHARS for key in keys):
        raise ValueError(f"{name} holds a key of less than {MIN_KEY_CHARS} characters; use longer keys")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
