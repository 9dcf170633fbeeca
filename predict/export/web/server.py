"""`mobilesam demo`: serve a web demo to this machine's browser, with the headers that threads need."""

from __future__ import annotations

import errno
import http
import mimetypes
import shutil
import signal
import sys
import threading
import webbrowser
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ....common.errors import Interrupted, PredictError, shown
from ....common.signals import StopFlag, stopped_by_signals
from ...config import DemoConfig
from .folder import DESCRIPTION_FILE, HEADERS, read_demo

HOST = "127.0.0.1"
"""Loopback: nobody else reaches the server."""

PORT = 8000
"""Port that is tried first; any free one if it is taken."""

TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm", ".onnx": "application/octet-stream"}
"""Media types that a system's own list may lack; a browser refuses scripts of another type."""


class DemoServer:
    """Server of one demo, bound to its port from the beginning.

    Args:
        config: all options.

    Raises:
        PredictError: the folder is no web demo or lacks files, or the port can't be used.
    """

    def __init__(self, config: DemoConfig) -> None:
        self._folder = config.folder
        description = read_demo(config.folder)
        if description is None:
            raise PredictError(
                f"{shown(str(config.folder))} is no web demo: mobilesam export --format web --out "
                f"{shown(str(config.folder))} makes one"
            )
        files = {*description["listing"], DESCRIPTION_FILE}
        missing = sorted(name for name in files if not (config.folder / name).is_file())
        if missing:
            raise PredictError(
                f"{shown(str(config.folder))} lacks {shown(missing[0])}, {len(missing)} of {len(files)} files are "
                "missing: export it again"
            )
        self._serving = False
        self._server = _bound(config.port, partial(_Handler, folder=config.folder, files=frozenset(files)))
        self.url = f"http://{HOST}:{self._server.server_address[1]}/"
        """Address of the page."""
        self.result: dict[str, Any] = {
            "url": self.url,
            "folder": str(config.folder),
            **{name: description.get(name) for name in ("student", "image_size", "student_size")},
        }
        """The object that `--json` prints."""

    def serve(self, opens: bool) -> None:
        """Serve until Ctrl-C, which is the usual end, or another signal.

        Args:
            opens: open the page in a browser.

        Raises:
            Interrupted: another signal than Ctrl-C's came.
        """
        self._serving = True
        if opens:
            # In a thread of its own: a text browser keeps the terminal until it ends.
            threading.Thread(target=webbrowser.open, args=(self.url,), daemon=True).start()
        try:
            with stopped_by_signals(StopFlag(), Interrupted, "interrupted"):
                self._server.serve_forever()
        except Interrupted as stop:
            if stop.signum != signal.SIGINT:
                raise
        finally:
            self._server.server_close()

    def close(self) -> None:
        """End `serve` in another thread, if it runs there, and give the port back."""
        if self._serving:
            self._server.shutdown()
        self._server.server_close()


def _bound(port: int | None, handler: Any) -> ThreadingHTTPServer:
    """Return a server bound to a port; to any free one if none is asked for and PORT is taken."""
    for number in (PORT, 0) if port is None else (port,):
        try:
            return _Server((HOST, number), handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and port is None and number:
                continue
            raise PredictError(
                f"--port {number} can't be used: {error.strerror}; give another one, or leave --port out for any "
                "that is free"
            ) from None
    raise AssertionError("port 0 is always free")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that go away during an answer; report any other error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers with the demo's files and nothing else.

    Args:
        folder: the demo's folder.
        files: paths of its files.
    """

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, folder: Path, files: frozenset[str], **kwargs: Any) -> None:
        self._folder, self._files = folder, files
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        """Send a file."""
        self._send(with_content=True)

    def do_HEAD(self) -> None:
        """Send a file's headers."""
        self._send(with_content=False)

    def _send(self, with_content: bool) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/") or "index.html"
        if name not in self._files:
            self.send_error(http.HTTPStatus.NOT_FOUND, "the demo has no such file")
            return
        try:
            file = open(self._folder / name, "rb")  # noqa: SIM115 - closed below
        except OSError as error:
            self.send_error(http.HTTPStatus.NOT_FOUND, error.strerror)
            return
        with file:
            self.send_response(http.HTTPStatus.OK)
            self.send_header("Content-Type", _media_type(name))
            self.send_header("Content-Length", str((self._folder / name).stat().st_size))
            self.send_header("Cache-Control", "no-cache")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if with_content:
                shutil.copyfileobj(file, self.wfile)

    def end_headers(self) -> None:
        """Add the headers that threads need to every answer."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the page tells what it does."""


def _media_type(name: str) -> str:
    known = TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
    return f"{known}; charset=utf-8" if known.startswith("text/") else known


def demo_lines(result: dict[str, Any]) -> list[str]:
    """Return the beginning of `demo` as text."""
    return [f"{result['student']} at {result['student_size']} pixels: {result['url']}"]
