"""`mobilesam demo`: what is served, with which headers, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mobilesam.cli import main
from mobilesam.common.errors import PredictError
from mobilesam.common.outputs import marked
from mobilesam.predict.config import DemoConfig
from mobilesam.predict.export.web import server as server_module
from mobilesam.predict.export.web.folder import DESCRIPTION_FILE, FORMAT, write_demo_folder
from mobilesam.predict.export.web.server import DemoServer

FILES = {
    "index.html": b"<html>page",
    "app.mjs": b"export {};",
    "runtime/a.wasm": b"\0asm",
    "networks/e.onnx": b"\x08",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    description = {
        "format": FORMAT, "student": "toy", "image_size": 64, "student_size": 64,
        "listing": dict.fromkeys(FILES, "0"),
    }  # fmt: skip
    content = {**FILES, DESCRIPTION_FILE: marked(json.dumps(description).encode(), "export")}
    write_demo_folder(tmp_path / "demo", content)
    (tmp_path / "demo" / "notes.txt").write_text("private")
    return tmp_path / "demo"


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    server = DemoServer(DemoConfig(folder=folder))
    threading.Thread(target=server.serve, args=(False,), daemon=True).start()
    yield server.url
    server.close()


@pytest.mark.parametrize(
    ("path", "name", "media_type"),
    [
        ("", "index.html", "text/html; charset=utf-8"),
        ("app.mjs?size=1", "app.mjs", "text/javascript; charset=utf-8"),
        ("runtime/a.wasm", "runtime/a.wasm", "application/wasm"),
        ("networks/e.onnx", "networks/e.onnx", "application/octet-stream"),
    ],
)
def test_files_come_with_their_type_and_the_headers_that_threads_need(
    path: str, name: str, media_type: str, url: str
) -> None:
    with urllib.request.urlopen(url + path) as answer:
        assert answer.read() == FILES[name]
        assert answer.headers["Content-Type"] == media_type
        assert answer.headers["Content-Length"] == str(len(FILES[name]))
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    with urllib.request.urlopen(urllib.request.Request(url + path, method="HEAD")) as answer:
        assert answer.read() == b""


@pytest.mark.parametrize(
    "path", ["notes.txt", "../demo/notes.txt", "%2e%2e/demo/notes.txt", "runtime", "nothing"]
)
def test_nothing_but_the_demos_files_is_served(path: str, url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url + path)


def test_only_this_machine_is_served(url: str) -> None:
    assert url.startswith("http://127.0.0.1:")


def test_a_folder_that_is_no_demo_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["demo", str(tmp_path)])
    assert done.exit_code == 3
    assert f"is no web demo: mobilesam export --format web --out {tmp_path} makes one" in done.stderr


def test_a_demo_that_lacks_files_is_refused(folder: Path) -> None:
    (folder / "app.mjs").unlink()
    with pytest.raises(PredictError, match=r"lacks app\.mjs, 1 of 5 files are missing: export it again"):
        DemoServer(DemoConfig(folder=folder))


def test_a_port_that_is_taken_is_refused_if_asked_for_and_avoided_if_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(PredictError, match=f"--port {taken} can't be used: Address already in use"):
            DemoServer(DemoConfig(folder=folder, port=taken))
        monkeypatch.setattr(server_module, "PORT", taken)
        server = DemoServer(DemoConfig(folder=folder))
        server.close()
        assert not server.url.endswith(f":{taken}/")


@pytest.mark.parametrize("port", ["0", "70000"])
def test_a_port_out_of_range_is_wrong_usage(port: str) -> None:
    done = CliRunner().invoke(main, ["demo", "--port", port])
    assert done.exit_code == 2
    assert f"--port {port} must be from 1 to 65535" in done.stderr


def test_the_page_is_opened_unless_it_must_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = threading.Event()
    addresses = []

    def browse(url: str) -> bool:
        addresses.append(url)
        opened.set()
        return True

    monkeypatch.setattr("webbrowser.open", browse)
    server = DemoServer(DemoConfig(folder=folder))
    threading.Thread(target=server.serve, args=(True,), daemon=True).start()
    assert opened.wait(60)
    server.close()
    assert addresses == [server.url]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_the_command_tells_the_address_as_json_and_serves_until_it_is_interrupted(
    signum: int, code: int, folder: Path
) -> None:
    command = [sys.executable, "-m", "mobilesam", "demo", str(folder), "--no-open", "--json"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    ) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        with urllib.request.urlopen(told["url"]) as answer:
            assert answer.read() == FILES["index.html"]
        process.send_signal(signum)
        out, err = process.communicate()
    assert process.returncode == code
    assert told == {
        "url": told["url"], "folder": str(folder), "student": "toy", "image_size": 64, "student_size": 64,
    }  # fmt: skip
    assert out == ""
    assert "Ctrl-C ends it" in err
    assert "Traceback" not in err
