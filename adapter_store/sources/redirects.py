"""Where a redirect may lead: a server must not make the store ask others, whom only the store can reach.

Pure. A name that resolves to an inner address is not looked through: it leads there only where it is allowed by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from ipaddress import ip_address

import httpx

_PORTS = {"https": 443, "http": 80}


def may_follow(url: httpx.URL, target: httpx.URL, hosts: Iterable[str] = ()) -> bool:
    """From `url` to the same scheme, host and port; on the same host from http to https; or to one of `hosts`.

    An entry of `hosts` is a shell pattern of a host, at its scheme's usual port, or `host:port`. An address (rather
    than a name) is meant by itself alone, never by a pattern. Never to http from https, nor with a user and a password.
    """
    if target.scheme not in _PORTS or target.userinfo or not target.host:
        return False
    if url.scheme == "https" and target.scheme == "http":
        return False
    port = _port(target)
    if target.host == url.host:
        is_upgrade = url.scheme == "http" and target.scheme == "https"
        if (target.scheme == url.scheme and port == _port(url)) or (is_upgrade and (_port(url), port) == (80, 443)):
            return True
    return any(_means(entry, target.host, port, _PORTS[target.scheme]) for entry in hosts)


def _port(url: httpx.URL) -> int:
    return url.port or _PORTS[url.scheme]


def _means(entry: str, host: str, port: int, usual_port: int) -> bool:
    pattern, colon, number = entry.rpartition(":")
    if not colon or "]" in number:  # the colon of an address of IPv6
        pattern, number = entry, str(usual_port)
    pattern = pattern.lower().removeprefix("[").removesuffix("]") if ":" in pattern else pattern.lower()
    if _is_address(host):
        return host == pattern and fnmatchcase(str(port), number)
    return fnmatchcase(host, pattern) and fnmatchcase(str(port), number)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return host.replace(".", "").isdecimal() or host.startswith("0x")  # as some resolvers read: 2130706433
    return True
