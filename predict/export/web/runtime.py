"""Files of onnxruntime-web for the web demo: from its npm package, which is downloaded once, or from a folder.

The version and the SHA-256 of package and files are fixed here: the page is tested with these files. The package is
kept in the cache, beside the checkpoints (`sam/weights/download.py`), so that later exports need no network.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ....common.durable import explain_os_errors
from ....common.errors import DownloadError, PredictError, shown
from ....sam.weights.download import Progress, Request, cache_directory, download_file, file_sha256

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
PACKAGE_BYTES = 33_106_585
PACKAGE_SHA256 = "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71"
REGISTRY = "https://registry.npmjs.org"
REGISTRY_VARIABLE = "npm_config_registry"
"""Environment variable by which npm, too, takes another registry."""

SHA256 = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    "ort.webgpu.bundle.min.mjs": "0730816731ce2cdfb06f273da065d4a1c7091eb9d1756a83b2916c8a89d015e2",
    "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
}
"""Files of the package's folder `dist` that a page needs, with their SHA-256."""

BUILDS = {
    "wasm": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
"""Script and program of each build; a browser loads one of them, the larger one for WebGPU."""

LICENCE_FILE = "LICENSE"
LICENCE = """\
onnxruntime-web {version}, https://github.com/microsoft/onnxruntime, the files beside this one

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.

The programs (.wasm) contain libraries of others; their notices:
https://github.com/microsoft/onnxruntime/blob/v{version}/ThirdPartyNotices.txt
"""
"""The npm package itself holds no text of its licence, only its name."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WebRuntime:
    """Files of onnxruntime-web."""

    files: Mapping[str, bytes]
    """Content by name, the names as in SHA256."""
    builds: tuple[str, ...]
    """Builds that are whole, keys of BUILDS; "wasm" is always one of them."""
    version: str | None
    """Version; None for files of a folder that aren't those of VERSION."""
    notes: tuple[str, ...] = field(default=())
    """Warnings, one sentence each."""

    @property
    def licence(self) -> bytes:
        """Text of the licence."""
        return LICENCE.format(version=self.version or VERSION).encode()


def find_runtime(folder: Path | None = None, progress: Progress | None = None) -> WebRuntime:
    """Read onnxruntime-web's files from a folder, else from the package in the cache, which is downloaded if missing.

    Args:
        folder: folder with the files, or with `dist` of the npm package in it; may lack those of WebGPU.
        progress: called during a download with the bytes received so far and the bytes in all.

    Raises:
        PredictError: a file is missing or damaged.
        DownloadError: the download failed; the message says where to put the file.
    """
    if folder is not None:
        return _from_folder(folder)
    package = cached_package()
    if not package.is_file():
        _download(package, progress)
    files = _from_package(package)
    return WebRuntime(files=files, builds=tuple(BUILDS), version=VERSION)


def cached_package() -> Path:
    """Return the place of the npm package in the cache; it need not exist."""
    return cache_directory() / f"{PACKAGE}-{VERSION}.tgz"


def _download(package: Path, progress: Progress | None) -> None:
    registry = os.environ.get(REGISTRY_VARIABLE) or REGISTRY
    url = f"{registry.rstrip('/')}/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz"
    try:
        download_file(
            Request(url=url, target=package, size=PACKAGE_BYTES, sha256=PACKAGE_SHA256), progress=progress
        )
    except DownloadError as error:
        raise DownloadError(
            f"{PACKAGE} {VERSION} ({PACKAGE_BYTES / 1e6:.0f} MB, once) could not be downloaded: {error}.\n"
            f"Put the package at {package}, or give --runtime-dir with a folder that holds its files "
            f"(npm pack {PACKAGE}@{VERSION}, on any machine)"
        ) from None


def _from_package(package: Path) -> dict[str, bytes]:
    """Return the files of the npm package, after a comparison of its SHA-256."""
    with explain_os_errors(package, PredictError):
        if file_sha256(package) != PACKAGE_SHA256:
            raise PredictError(
                f"{shown(str(package))} is damaged, or not {PACKAGE} {VERSION}: delete it, and the next export "
                "downloads it again"
            )
        with tarfile.open(package) as archive:
            contents = {name: archive.extractfile(f"package/dist/{name}") for name in SHA256}
            return {name: content.read() for name, content in contents.items() if content is not None}


def _from_folder(folder: Path) -> WebRuntime:
    """Return the files of a folder; files of another version are taken, with a warning."""
    if not folder.is_dir():
        raise PredictError(f"--runtime-dir {shown(str(folder))} is no folder")
    places = (folder, folder / "dist", folder / "package" / "dist")
    place = next((each for each in places if (each / BUILDS["wasm"][0]).is_file()), folder)
    builds = [build for build, names in BUILDS.items() if all((place / name).is_file() for name in names)]
    if "wasm" not in builds:
        missing = [name for name in BUILDS["wasm"] if not (place / name).is_file()]
        raise PredictError(
            f"--runtime-dir {shown(str(folder))} lacks {' and '.join(missing)}: give the folder dist of the npm "
            f"package {PACKAGE} {VERSION}"
        )
    with explain_os_errors(folder, PredictError, "--runtime-dir"):
        files = {name: (place / name).read_bytes() for build in builds for name in BUILDS[build]}
    others = [name for name, data in files.items() if hashlib.sha256(data).hexdigest() != SHA256[name]]
    notes = []
    if others:
        notes.append(
            f"--runtime-dir: {', '.join(others)} not of {PACKAGE} {VERSION}, with which the page is tested"
        )
    if "webgpu" not in builds:
        notes.append(f"--runtime-dir has no {' and '.join(BUILDS['webgpu'])}: the page won't use WebGPU")
    return WebRuntime(
        files=files, builds=tuple(builds), version=None if others else VERSION, notes=tuple(notes)
    )
