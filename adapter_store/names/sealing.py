"""URLs that let whoever has them in: kept encrypted, under a key that a setting names, or in memory only."""

from __future__ import annotations

import json
from collections.abc import Mapping

from cryptography.fernet import Fernet, InvalidToken

from adapter_store.errors import StoreConfigInvalid

NOT_KEPT = "not kept"  # stands where URLs were that must not be written
_SEALED = "sealed:"


def is_secret(text: str) -> bool:
    """Whether a URL may hold a signature, a token or a password: whatever has a query or names a user."""
    return "://" in text and ("?" in text or "@" in text)


class Sealer:
    """`key` is one of `cryptography.fernet.Fernet.generate_key()`; None: nothing can be sealed.

    Raises: StoreConfigInvalid for a key that is none, without showing it.
    """

    def __init__(self, key: str | None) -> None:
        try:
            self._fernet = None if key is None else Fernet(key.encode())
        except ValueError:
            raise StoreConfigInvalid(
                "url_key_env",
                "what the variable holds is no key; make one with "
                "`python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'`",
            ) from None

    def seal(self, text: str) -> str:
        """`text` as it may be written: itself if it holds no secret, encrypted, or NOT_KEPT."""
        if not is_secret(text):
            return text
        return json.dumps(NOT_KEPT) if self._fernet is None else _SEALED + self._fernet.encrypt(text.encode()).decode()

    def open(self, text: str) -> str | None:
        """What was sealed; None: it was not kept, or under another key."""
        if text == json.dumps(NOT_KEPT):
            return None
        if not text.startswith(_SEALED):
            return text
        if self._fernet is None:
            return None
        try:
            return self._fernet.decrypt(text.removeprefix(_SEALED).encode()).decode()
        except InvalidToken:
            return None


def from_environment(variable: str | None, environment: Mapping[str, str]) -> Sealer:
    """The sealer with the key that `variable` holds. Raises: StoreConfigInvalid when it holds none."""
    if variable is None:
        return Sealer(None)
    if not environment.get(variable):
        raise StoreConfigInvalid("url_key_env", f"the environment variable {variable!r} is not set here")
    return Sealer(environment[variable])
