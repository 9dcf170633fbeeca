"""onnxruntime-web's files: from the npm package, downloaded once, or from a folder."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobilesam.common.errors import DownloadError, PredictError
from mobilesam.predict.export.web import runtime
from mobilesam.predict.export.web.runtime import BUILDS, SHA256, cached_package, find_runtime

CONTENT = {name: f"content of {name}".encode() for name in SHA256}


def _package() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in {"package.json": b"{}", **{f"dist/{n}": d for n, d in CONTENT.items()}}.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A registry with a small package in onnxruntime-web's place, and an empty cache; the paths asked for."""
    package, asked = _package(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(package)))
            self.end_headers()
            self.wfile.write(package)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MOBILESAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setattr(runtime, "PACKAGE_BYTES", len(package))
    monkeypatch.setattr(runtime, "PACKAGE_SHA256", hashlib.sha256(package).hexdigest())
    monkeypatch.setattr(runtime, "SHA256", {n: hashlib.sha256(d).hexdigest() for n, d in CONTENT.items()})
    yield asked
    server.shutdown()
    server.server_close()


def test_the_package_is_downloaded_once_and_needs_no_network_afterwards(registry: list[str]) -> None:
    first, again = find_runtime(), find_runtime()
    assert registry == ["/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz"]
    assert first.files == again.files == CONTENT
    assert set(first.builds) == set(BUILDS)
    assert b"MIT License" in first.licence
    assert b"1.30.0" in first.licence


def test_another_package_than_the_one_whose_digest_is_known_is_refused(
    registry: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "PACKAGE_SHA256", "0" * 64)
    with pytest.raises(DownloadError, match=r"SHA-256.*\n.*--runtime-dir"):
        find_runtime()
    assert not cached_package().exists()


def test_a_package_damaged_in_the_cache_is_named(registry: list[str]) -> None:
    find_runtime()
    data = bytearray(cached_package().read_bytes())
    data[len(data) // 2] ^= 1
    cached_package().write_bytes(data)
    with pytest.raises(PredictError, match=r"onnxruntime-web-1\.30\.0\.tgz is damaged.*delete it"):
        find_runtime()


def test_without_a_network_the_message_says_where_to_put_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOBILESAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setattr("mobilesam.sam.weights.download.time.sleep", lambda _: None)
    with pytest.raises(
        DownloadError, match=r"33 MB, once.*\n.*cache/onnxruntime-web-1\.30\.0\.tgz.*--runtime-dir"
    ):
        find_runtime()


@pytest.mark.parametrize("place", ["", "dist", "package/dist"])
def test_a_folder_with_the_files_takes_the_place_of_the_package(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "SHA256", {n: hashlib.sha256(d).hexdigest() for n, d in CONTENT.items()})
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, data in CONTENT.items():
        (tmp_path / place / name).write_bytes(data)
    found = find_runtime(tmp_path)
    assert found.files == CONTENT
    assert (found.version, found.notes) == ("1.30.0", ())


def test_files_of_another_version_are_taken_with_a_warning(tmp_path: Path) -> None:
    for name in BUILDS["wasm"]:
        (tmp_path / name).write_bytes(CONTENT[name])
    found = find_runtime(tmp_path)
    assert set(found.files) == set(BUILDS["wasm"])
    assert found.builds == ("wasm",)
    assert found.version is None
    other, without_gpu = found.notes
    assert "not of onnxruntime-web 1.30.0" in other
    assert "won't use WebGPU" in without_gpu


def test_a_folder_without_the_files_is_refused_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "ort.wasm.bundle.min.mjs").write_bytes(b"")
    with pytest.raises(PredictError, match=r"lacks ort-wasm-simd-threaded\.wasm: give the folder dist"):
        find_runtime(tmp_path)
    with pytest.raises(PredictError, match="is no folder"):
        find_runtime(tmp_path / "nowhere")
