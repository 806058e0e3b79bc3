"""A small server that answers JSON with JSON: rewards, and chat completions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Answer = Callable[[str, dict[str, Any]], Any]
"""Takes path and body; gives what is answered, an int for a status without a body, bytes as they are, or a Moved."""


class Moved(NamedTuple):
    """An answer that names another address."""

    to: str


@contextmanager
def serve_json(answer: Answer, port: int = 0) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serves on this machine; gives the address, and the list of what it was asked: path, body, headers."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({"path": self.path, "body": body, "headers": dict(self.headers)})
            found = answer(self.path, body)
            if isinstance(found, Moved):
                self.send_response(302)
                self.send_header("Location", found.to)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(found if isinstance(found, int) else 200)
            self.send_header("Content-Length", str(0 if isinstance(found, int) else len(content)))
            self.end_headers()
            if not isinstance(found, int):
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
