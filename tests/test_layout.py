"""The rules about what lies where, and who may import whom."""

from __future__ import annotations

import ast
import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "common": set(),
    "store": {"common"},
    "sam": {"common"},
    "precompute": {"common", "store", "sam"},
    "distill": {"common", "store", "sam"},
    "predict": {"common", "store", "sam", "distill"},
    "verify": {"common", "store", "sam", "distill", "predict"},
    "cli": {"common", "store", "sam", "precompute", "distill", "verify", "predict"},
}
"""The rooms that each room may import; docs/ARCHITECTURE.md draws them."""
ROOMS = [name for name in MAY_IMPORT if name != "cli"]


def _tracked() -> list[str]:
    """The files of the checkout; of the folder, where there is no git (an unpacked sdist)."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, dotted module) of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


def _rooms_imported(path: Path) -> set[str]:
    """The rooms that a file imports from outside its own."""
    depth, outside = len(path.relative_to(ROOT).parts) - 1, set()
    for level, module in _imports(path):
        assert module.split(".")[0] != "mobilesam", f"{path}: imports inside the package are relative"
        assert level <= depth + 1, f"{path}: imports from outside the package"
        if level == depth + 1 and module:
            outside.add(module.split(".")[0])
    return outside


def _files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_only(room: str) -> None:
    for path in _files(room):
        outside = _rooms_imported(path) - {room}
        assert outside <= MAY_IMPORT[room], path


def test_nobody_imports_the_command_line() -> None:
    assert _rooms_imported(ROOT / "cli.py") <= MAY_IMPORT["cli"]
    for room in ROOMS:
        for path in _files(room):
            assert "cli" not in _rooms_imported(path)


def test_torch_stays_out_of_the_store() -> None:
    for path in _files("store") + _files("common"):
        assert not any(module.split(".")[0] == "torch" for _, module in _imports(path)), path


def test_tests_and_benchmarks_import_as_users_do() -> None:
    for name in _tracked():
        if name.startswith(("tests/", "benchmarks/", "examples/")) and name.endswith(".py"):
            assert all(level == 0 for level, _ in _imports(ROOT / name)), name


def test_the_root_holds_the_package_and_no_more_code() -> None:
    code = {name for name in _tracked() if "/" not in name and name.endswith(".py")}
    assert code == {"__init__.py", "__main__.py", "cli.py"}
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert [type(node) for node in tree.body] == [ast.Expr, ast.Assign]
    assert not [name for name in _tracked() if name.startswith("tests/") and name.endswith("__init__.py")]


def test_setup_lists_every_room_by_name() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = {name.removesuffix("/__init__.py") for name in _tracked() if name.endswith("/__init__.py")}
    assert sorted(listed) == sorted(
        ["mobilesam", *("mobilesam." + name.replace("/", ".") for name in folders)]
    )
    assert {name.split("/")[0] for name in folders} == set(ROOMS)


def test_help_loads_neither_torch_nor_zarr_nor_dask() -> None:
    script = (
        "import sys\n"
        "from mobilesam.cli import main\n"
        "main(['precompute', '--help'], standalone_mode=False)\n"
        "print(sorted({'torch', 'zarr', 'dask', 'distributed', 'numpy', 'PIL'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and a wheel built from a copy of the checkout."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "a checkout-with dashes"
    for name in _tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    package = {name.removeprefix("mobilesam/") for name in names if name.startswith("mobilesam/")}
    assert all(name.startswith(("mobilesam/", "mobilesam-")) for name in names)
    expected = {
        name
        for name in _tracked()
        if name in ("__init__.py", "__main__.py", "cli.py", "py.typed")
        or (name.split("/")[0] in ROOMS and name.endswith((".py", ".pyi", ".j2", ".safetensors")))
    }
    assert package == expected
    assert any(name.endswith("licenses/NOTICE") for name in names)


def test_the_sdist_can_build_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert {"setup.cfg", "LICENSE", "NOTICE", "cli.py", "store/layout.py"} <= names
    (source,) = tmp_path.iterdir()
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(source)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (again,) = tmp_path.glob("*.whl")
    (wheel,) = built.glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_the_installed_wheel_runs(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    script = "import mobilesam.verify.report as r; print(mobilesam.__file__); print(r.__file__)"
    # -I leaves the checkout's editable finder in place; the target folder comes before it.
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); "
         "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; import mobilesam; " + script],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert all(line.startswith(str(site)) for line in done.stdout.splitlines())
    assert (site / "bin" / "mobilesam").exists()
