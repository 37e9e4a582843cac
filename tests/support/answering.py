"""A server that answers every connection with the same bytes, for answers that no real server gives on demand."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.waiting import ended


@contextmanager
def answering(answer: bytes, *, endless: threading.Event | None = None) -> Iterator[str]:
    """Its address. With `endless` it goes on with zeros until the client hangs up, and then sets the event."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                if line == b"\r\n":
                    break
            self.wfile.write(answer)
            if endless is None:
                return
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
            except OSError:
                endless.set()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            ended(thread, "the server's thread")
