"""The rules about what lies where, and who may import whom."""

from __future__ import annotations

import ast
import configparser
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
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
    "doctor": {"common", "store", "sam", "precompute", "distill"},
    "cli": {"common", "store", "sam", "precompute", "distill", "verify", "predict", "doctor"},
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


def test_the_map_says_who_may_import_whom() -> None:
    table = (ROOT / "docs" / "ARCHITECTURE.md").read_text().split("## Rooms")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]*)\|", table, re.MULTILINE)
    assert {room: set(re.findall(r"\w+", others)) for room, others in rows} == MAY_IMPORT


def test_nobody_imports_the_command_line() -> None:
    assert _rooms_imported(ROOT / "cli.py") <= MAY_IMPORT["cli"]
    for room in ROOMS:
        for path in _files(room):
            assert "cli" not in _rooms_imported(path)


def _modules() -> dict[str, Path]:
    """{dotted name below the package: file} of every module, packages as their folder's name."""
    found = {}
    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in _files(room))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imported(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, those inside functions and for type checking included."""
    folder = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in modules else ".".join(base))
    return found & set(modules)


def _imports_of_all() -> dict[str, set[str]]:
    modules = _modules()
    graph = {name: _imported(name, path, modules) for name, path in modules.items()}
    for name, path in modules.items():
        stub = path.with_suffix(".pyi")
        if stub.exists():  # names that a package loads on first use
            graph[name] |= _imported(name, path, modules) | {
                ".".join([*name.split("."), module])
                for level, module in _imports(stub)
                if level == 1 and module
            } & set(modules)
    return graph


def test_no_module_is_imported_in_a_circle() -> None:
    graph = _imports_of_all()
    # The root and the rooms' own names are only a way in: what they load is counted where it stands.
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_package_has_few_modules_and_each_is_neither_too_long_nor_too_short() -> None:
    modules, graph = _modules(), _imports_of_all()
    assert len(modules) < 191
    importers = {name: {other for other in graph if name in graph[other]} for name in modules}
    for name, path in modules.items():
        lines = len(path.read_text().splitlines())
        assert lines <= 500, f"{path}: {lines} lines hold a second chapter"
        if lines < 40 and path.name not in ("__init__.py", "__main__.py"):
            assert len(importers[name]) != 1, f"{path}: {lines} lines that only {importers[name]} imports"


def test_no_folder_holds_more_than_twenty_files() -> None:
    count = Counter(str(Path(name).parent) for name in _tracked())
    assert {folder: files for folder, files in count.items() if files > 20} == {}


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def _is_frozen(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and any(
        word.arg == "frozen" and getattr(word.value, "value", False) for word in decorator.keywords
    )


def test_nothing_takes_more_than_eight_parameters_but_frozen_dataclasses() -> None:
    for path in _modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert _parameters(node) <= 8, f"{path}:{node.lineno} {node.name}"
            elif isinstance(node, ast.ClassDef) and "dataclass" in ast.unparse(node.decorator_list):
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                frozen = any(map(_is_frozen, node.decorator_list))
                assert frozen or len(fields) <= 8, f"{path}:{node.lineno} {node.name}"


RIDDLES = re.compile(r"(What|Whether|Which|How|Of|As|Where|That|Those|None where)\b")


def test_docstrings_open_with_what_a_thing_does_or_is() -> None:
    for path in _modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                assert not RIDDLES.match(text), f"{path}:{getattr(node, 'lineno', 1)} {text[:60]!r}"


def test_functions_that_other_files_use_say_what_they_take() -> None:
    modules = _modules()
    imported = {
        (alias.name, node.module.split(".")[-1])
        for path in modules.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level and node.module
        for alias in node.names
    }
    for name, path in modules.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and (node.name, name.split(".")[-1]) in imported:
                told = "Args:" in (ast.get_docstring(node) or "")
                assert told or _parameters(node) < 2, f"{path}:{node.lineno} {node.name}"


LEGEND = re.compile(r"Shape suffixes:(.*?)(?:\n\n|\Z)", re.DOTALL)
SUFFIX = re.compile(r"[a-z0-9]_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*|[ghpnw]+[0-9]*)\Z")


def _letters(path: Path) -> set[str]:
    """Letters that a module's names end in to tell shapes, as B, C, H and W in `emb_BCHW`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
        suffix = SUFFIX.search(name)
        if suffix and not name.isupper():
            found |= {letter for letter in suffix.group(1) if letter.isalpha()}
    return found


def test_shape_suffixes_have_a_legend_and_one_meaning() -> None:
    table = (ROOT / "docs" / "ARCHITECTURE.md").read_text().split("## Letters of shapes")[1].split("\n## ")[0]
    known = set("".join(re.findall(r"^\| `([A-Za-z, `]+)` \|", table, re.MULTILINE))) - set(", `")
    for path in _modules().values():
        letters = _letters(path)
        legend = LEGEND.search(ast.get_docstring(ast.parse(path.read_text())) or "")
        assert not letters or legend, f"{path}: no legend for {sorted(letters)}"
        told = set(re.findall(r"\b[A-Za-z]\b", legend.group(1))) if legend else set()
        assert letters <= told, f"{path}: the legend lacks {sorted(letters - told)}"
        assert letters <= known, f"{path}: docs/ARCHITECTURE.md lacks {sorted(letters - known)}"


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


SHIPPED = (".py", ".pyi", ".j2", ".safetensors", ".html", ".css", ".mjs")


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
        or (name.split("/")[0] in ROOMS and name.endswith(SHIPPED))
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
