"""Whether a request comes from this machine's own user, where no key says so.

On a loopback address without keys everyone on the machine may change what is served. Their browsers may not do it for
the pages that they visit: not across origins, not under a name that somebody else's DNS points here, not by a form.
Who is connected decides nothing: behind a proxy that is the proxy.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from deployments.calls import Fault, Refused

# A proxy says here for whom it asks: then the machine's own user it may not be.
PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
# Origins of pages that the browser's own machine serves: who is at it runs them.
LOOPBACK_PAGES = r"https?://(localhost|127\.\d{1,3}\.\d{1,3}\.\d{1,3}|\[::1\])(:\d{1,5})?"
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:\[\]@/\\?#]+)(?::(\d{1,5}))?", re.IGNORECASE)
_DEFAULT_PORTS = {"http": 80, "https": 443}


def is_loopback(host: str | None) -> bool:
    """Whether a server that listens on `host`, or a client that names it, stays on its machine. None: not known."""
    name = (host or "").strip().lower().removeprefix("[").removesuffix("]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False  # "" and every other name: it may be anybody's


def check_is_local(headers: Headers) -> None:
    """Raises: Refused (`cross_origin`) when a page of another origin, or a proxy, may be behind the request."""
    remedy = "send it to the server's own address, or set admin_keys_env and send a key"
    hosts = headers.getlist("host")
    host = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    if host is None or not is_loopback(host[1]):
        raise _refused(
            f"the header Host is {', '.join(hosts)!r:.100}, which is not localhost or a loopback address", remedy
        )
    told = next((name for name in PROXY_HEADERS if name in headers), None)
    if told is not None:
        raise _refused(f"the header {told} says that a proxy passed the request on", remedy)
    for origin in headers.getlist("origin"):
        if not _is_same(origin, host):
            raise _refused(f"the header Origin is {origin!r:.100}, which is not this server's", remedy)
    site = headers.get("sec-fetch-site", "none")
    if site not in ("none", "same-origin"):
        raise _refused(f"the header Sec-Fetch-Site is {site!r:.100}: a page of another origin asks", remedy)


def check_is_json(headers: Headers) -> None:
    """A form of any page can be sent here as text or as fields, but not as JSON.

    Raises: Refused (`unsupported_media_type`).
    """
    told = headers.getlist("content-type")
    if [value.partition(";")[0].strip().lower() for value in told] != ["application/json"]:
        message = f"the header Content-Type is {', '.join(told)!r:.100}; send 'Content-Type: application/json'"
        raise Refused(Fault(code="unsupported_media_type", message=message))


def _is_same(origin: str, host: re.Match[str]) -> bool:
    try:
        parts = urlsplit(origin)
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError):
        return False  # "null", and what is no origin
    named = (parts.hostname or "").lower()
    is_plain = origin.lower() == f"{parts.scheme}://{parts.netloc}".lower() and "@" not in parts.netloc
    return is_plain and (named, port) == (
        host[1].lower().strip("[]"),
        int(host[2] or _DEFAULT_PORTS[parts.scheme]),
    )


def _refused(what: str, remedy: str) -> Refused:
    return Refused(Fault(code="cross_origin", message=f"this changes what is served, and {what}; {remedy}"))
