"""A web server of a folder that answers each question after a while: GET, HEAD, ranges, strong ETags. Ends with stdin.

python -m benchmarks.adapters.far_server FOLDER LATENCY_MS      (prints its port)
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import sys
from functools import cache
from pathlib import Path

_RANGE = re.compile(rb"(?im)^range: bytes=(\d+)-(\d*)")


@cache
def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@cache
def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def answer(folder: Path, head: bytes) -> bytes:
    """What is answered to a request with this head."""
    method, target, *_ = head.decode("latin-1").split(" ")
    content = _content(folder / target.lstrip("/"))
    if content is None:
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    told = f'ETag: "{_etag(content)}"\r\nAccept-Ranges: bytes\r\n'
    status, body = "200 OK", content
    if (found := _RANGE.search(head)) is not None:
        start, end = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
        status, body = "206 Partial Content", content[start : end + 1]
        told += f"Content-Range: bytes {start}-{end}/{len(content)}\r\n"
    first = f"HTTP/1.1 {status}\r\n{told}Content-Length: {len(body)}\r\n\r\n".encode()
    return first if method == "HEAD" else first + body


async def serve(folder: Path, latency_s: float) -> None:
    """Until stdin ends."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(latency_s)
                writer.write(answer(folder, head))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2]) / 1e3))
