"""API keys: who may ask, and on whose account."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os

from deployments.calls import Fault, Refused

logger = logging.getLogger("ray.serve")

MIN_KEY_CHARS = 16


class ApiKeys:
    """The accepted keys, kept as digests. No keys: everyone may ask."""

    def __init__(self, keys: tuple[str, ...] = ()) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    @classmethod
    def from_env(cls, name: str | None) -> ApiKeys:
        """Keys of the environment variable `name`, separated by commas.

        Raises: ValueError when the variable is missing or a key is short: a typo must not open the server.
        """
        if name is None:
            logger.warning("api_keys_env is not set: everyone who reaches the port may use this server")
            return cls()
        keys = tuple(key.strip() for key in os.environ.get(name, "").split(",") if key.strip())
        if not keys:
            raise ValueError(f"api_keys_env names {name!r}, but that environment variable holds no key; set it")
        if any(len(key) < MIN_KEY_CHARS for key in keys):
            raise ValueError(f"{name} holds a key of less than {MIN_KEY_CHARS} characters; use longer keys")
        return cls(keys)

    def tenant(self, authorization: str | None) -> str:
        """A short digest of the caller's key; "" when the server is open. Raises: Refused (`invalid_api_key`).

        All keys are compared, each in constant time, so that the answer's time tells nothing.
        """
        if not self._digests:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            problem = "no API key was given" if not key else "the API key is not known"
            raise Refused(Fault(code="invalid_api_key", message=f"{problem}; send 'Authorization: Bearer <key>'"))
        return digest.hex()[:12]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
