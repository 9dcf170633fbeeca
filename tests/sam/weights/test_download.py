from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilesam.common.errors import DownloadError
from mobilesam.sam.weights import download
from mobilesam.sam.weights.download import Request, download_file

BODY = np.random.default_rng(1).bytes(300_000)
NEWER = np.random.default_rng(2).bytes(300_000)


@dataclass
class Server:
    """What the loopback server holds and how it misbehaves; ``asked`` are the Range headers it saw."""

    url: str = ""
    body: bytes = BODY
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    hang_up_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    shifted: bool = False
    told_length: int | None = None
    asked: list[str | None] = field(default_factory=list)


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            server.asked.append(asked)
            if server.statuses and (status := server.statuses.pop(0)) != 200:
                self.send_error(status)
                return
            start = self._granted(asked)
            if start is not None and start >= len(server.body):
                self.send_error(416)
                return
            self._answer(start)

        def _granted(self, asked: str | None) -> int | None:
            current = server.etag if server.etag else server.modified
            if asked is None or not server.ranges or self.headers.get("If-Range") != current:
                return None
            return int(asked.removeprefix("bytes=").removesuffix("-"))

        def _answer(self, start: int | None) -> None:
            body = server.body[start or 0 :]
            self.send_response(200 if start is None else 206)
            if start is not None:
                end, total = len(server.body) - 1, len(server.body)
                self.send_header("Content-Range", f"bytes {start + server.shifted}-{end}/{total}")
            self.send_header("Content-Length", str(server.told_length or len(body)))
            if server.etag:
                self.send_header("ETag", server.etag)
            if server.modified:
                self.send_header("Last-Modified", server.modified)
            self.end_headers()
            if server.hang_up_after:
                body = body[: server.hang_up_after.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

    return Handler


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    state.url = f"http://127.0.0.1:{http.server_port}/weights.pth"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield state
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture
def wanted(server: Server, tmp_path: Path) -> Callable[..., Request]:
    def make(body: bytes = BODY, **changes: Any) -> Request:
        digest = hashlib.sha256(body).hexdigest()
        values = {"url": server.url, "target": tmp_path / "cache" / "weights.pth", "backoff": 0.0}
        return Request(**{**values, "size": len(body), "sha256": digest, **changes})

    return make


def interrupted(request: Request, server: Server, after: int) -> None:
    """Leave ``part`` as an attempt that was cut off after so many bytes leaves it."""
    server.hang_up_after = [after]
    with pytest.raises(DownloadError, match=f"ended after {after:,} of {request.size:,}"):
        download_file(Request(**{**vars(request), "attempts": 1}))
    assert request.part.stat().st_size == after
    assert not request.target.exists()
    server.asked.clear()


def leftovers(request: Request) -> set[str]:
    return {path.name for path in request.target.parent.iterdir()} - {"weights.pth.lock"}


def test_a_whole_download_is_in_place_alone(server: Server, wanted: Callable[..., Request]) -> None:
    request = wanted()
    download_file(request)
    assert request.target.read_bytes() == BODY
    assert leftovers(request) == {"weights.pth"}
    assert server.asked == [None]


def test_a_file_that_is_there_is_not_asked_for_again(server: Server, wanted: Callable[..., Request]) -> None:
    request = wanted()
    download_file(request)
    download_file(request)
    assert server.asked == [None]


def test_progress_runs_from_nothing_to_all(
    server: Server, wanted: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "CHUNK", 100_000)
    seen: list[tuple[int, int]] = []
    download_file(wanted(), lambda done, total: seen.append((done, total)))
    assert seen == [(done, 300_000) for done in (0, 100_000, 200_000, 300_000)]


def test_a_connection_cut_at_half_is_resumed_there(server: Server, wanted: Callable[..., Request]) -> None:
    server.hang_up_after = [150_000]
    request = wanted()
    download_file(request)
    assert request.target.read_bytes() == BODY
    assert server.asked == [None, "bytes=150000-"]


def test_cuts_that_each_bring_bytes_may_be_many(server: Server, wanted: Callable[..., Request]) -> None:
    server.hang_up_after = [30_000] * 8
    request = wanted(attempts=2)
    download_file(request)
    assert request.target.read_bytes() == BODY
    assert len(server.asked) == 9


@pytest.mark.parametrize(("etag", "modified"), [('"one"', None), (None, "Tue, 04 Apr 2023 21:00:00 GMT")])
def test_a_later_command_resumes_where_an_earlier_one_ended(
    server: Server, wanted: Callable[..., Request], etag: str | None, modified: str | None
) -> None:
    server.etag, server.modified = etag, modified
    request = wanted()
    interrupted(request, server, 123_456)
    seen: list[int] = []
    download_file(request, lambda done, total: seen.append(done))
    assert request.target.read_bytes() == BODY
    assert server.asked == ["bytes=123456-"]
    assert seen[0] == 123_456


def test_a_file_that_changed_on_the_server_is_fetched_from_its_beginning(
    server: Server, wanted: Callable[..., Request]
) -> None:
    interrupted(wanted(), server, 150_000)
    server.body, server.etag = NEWER, '"two"'
    request = wanted(NEWER)
    download_file(request)
    assert request.target.read_bytes() == NEWER
    assert server.asked == ["bytes=150000-"]


def test_a_server_that_ignores_ranges_starts_again(server: Server, wanted: Callable[..., Request]) -> None:
    request = wanted()
    interrupted(request, server, 150_000)
    server.ranges = False
    download_file(request)
    assert request.target.read_bytes() == BODY


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_version_nothing_is_continued(
    server: Server, wanted: Callable[..., Request], etag: str | None
) -> None:
    server.etag = etag
    request = wanted()
    interrupted(request, server, 150_000)
    download_file(request)
    assert request.target.read_bytes() == BODY
    assert server.asked == [None]


def test_a_part_from_another_address_is_not_continued(server: Server, wanted: Callable[..., Request]) -> None:
    interrupted(wanted(), server, 150_000)
    request = wanted(url=server.url + "?mirror")
    download_file(request)
    assert server.asked == [None]
    assert request.target.read_bytes() == BODY


def test_a_part_without_its_version_is_not_continued(server: Server, wanted: Callable[..., Request]) -> None:
    request = wanted()
    interrupted(request, server, 150_000)
    request.version_file.write_text("{torn")
    download_file(request)
    assert server.asked == [None]
    assert request.target.read_bytes() == BODY


def test_a_whole_part_is_checked_and_placed_without_asking(
    server: Server, wanted: Callable[..., Request]
) -> None:
    request = wanted()
    interrupted(request, server, 299_999)
    with request.part.open("ab") as part:
        part.write(BODY[-1:])
    download_file(request)
    assert server.asked == []
    assert request.target.read_bytes() == BODY


def test_a_range_that_cannot_be_satisfied_starts_again(
    server: Server, wanted: Callable[..., Request]
) -> None:
    request = wanted()
    interrupted(request, server, 150_000)
    server.statuses = [416]
    download_file(request)
    assert server.asked == ["bytes=150000-", None]
    assert request.target.read_bytes() == BODY


def test_a_range_other_than_asked_starts_again(server: Server, wanted: Callable[..., Request]) -> None:
    request = wanted()
    interrupted(request, server, 150_000)
    server.shifted = True
    download_file(request)
    assert server.asked == ["bytes=150000-", None]
    assert request.target.read_bytes() == BODY


def test_wrong_bytes_are_removed_and_both_digests_said(
    server: Server, wanted: Callable[..., Request]
) -> None:
    server.body = NEWER
    request = wanted()
    with pytest.raises(DownloadError, match=r"SHA-256 is \w{64}, not \w{64}; it was removed") as caught:
        download_file(request)
    assert request.sha256 in str(caught.value)
    assert leftovers(request) == set()


def test_a_continued_part_with_a_flipped_bit_is_found(server: Server, wanted: Callable[..., Request]) -> None:
    request = wanted()
    interrupted(request, server, 150_000)
    damaged = bytearray(request.part.read_bytes())
    damaged[1000] ^= 4
    request.part.write_bytes(damaged)
    with pytest.raises(DownloadError, match="SHA-256"):
        download_file(request)
    assert leftovers(request) == set()


def test_another_length_is_refused_before_it_is_received(
    server: Server, wanted: Callable[..., Request]
) -> None:
    server.body = BODY + b"more"
    request = wanted()
    seen: list[int] = []
    with pytest.raises(DownloadError, match="has 300,004 bytes, not 300,000"):
        download_file(request, lambda done, total: seen.append(done))
    assert seen == []
    assert not request.target.exists()


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_final(server: Server, wanted: Callable[..., Request], status: int) -> None:
    server.statuses = [status]
    with pytest.raises(DownloadError, match=f"answered {status}"):
        download_file(wanted())
    assert server.asked == [None]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_tried_again(
    server: Server, wanted: Callable[..., Request], status: int
) -> None:
    server.statuses = [status, status]
    request = wanted()
    download_file(request)
    assert request.target.read_bytes() == BODY
    assert len(server.asked) == 3


def test_a_lasting_failure_ends_after_the_attempts_with_growing_waits(
    server: Server, wanted: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.statuses = [503] * 10
    with pytest.raises(DownloadError, match="answered 503"):
        download_file(wanted(attempts=4, backoff=1.0))
    assert waits == [1, 2, 4]
    assert len(server.asked) == 4


def test_no_server_is_an_error_that_names_the_address(wanted: Callable[..., Request], server: Server) -> None:
    address = "http://127.0.0.1:9/weights.pth"
    with pytest.raises(DownloadError, match=f"{address}: .*refused"):
        download_file(wanted(url=address))


def test_a_name_that_does_not_resolve_is_an_error(wanted: Callable[..., Request], server: Server) -> None:
    with pytest.raises(DownloadError, match=r"no-such-host\.invalid"):
        download_file(wanted(url="http://no-such-host.invalid/weights.pth", attempts=1))


def test_an_attempt_ends_when_the_server_falls_silent(server: Server, wanted: Callable[..., Request]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth"
        with pytest.raises(DownloadError, match="timed out"):
            download_file(wanted(url=url, timeout=0.2, attempts=2))


def test_too_little_room_is_said_before_asking(
    server: Server, wanted: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = download.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"300,000 bytes are needed, 1,000 are free"):
        download_file(wanted())
    assert server.asked == []


def test_a_disk_that_fills_up_is_said_and_keeps_the_part(
    server: Server, wanted: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, chunk: bytes) -> int:
            raise OSError(28, "No space left on device")

    original = download._write
    monkeypatch.setattr(
        download, "_write", lambda request, part, chunk: original(request, FullDisk(part), chunk)
    )
    request = wanted()
    with pytest.raises(DownloadError, match="no room left in"):
        download_file(request)
    assert request.part.exists()


def test_a_cache_that_cannot_be_made_is_an_error(wanted: Callable[..., Request], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="file"):
        download_file(wanted(target=tmp_path / "file" / "weights.pth"))


def test_of_two_processes_that_want_the_same_file_one_downloads_it(
    server: Server, wanted: Callable[..., Request]
) -> None:
    request = wanted()
    threads = [threading.Thread(target=download_file, args=(request,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert request.target.read_bytes() == BODY
    assert server.asked == [None]
