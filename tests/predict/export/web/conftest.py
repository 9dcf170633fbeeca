from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mobilesam

PAGE = Path(mobilesam.__file__).parent / "predict" / "export" / "web" / "page"

Node = Callable[[str], Any]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A function that runs JavaScript in tmp_path, the page's modules at hand, and returns `result`."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("there is no node here to run the page's modules")

    def run(code: str) -> Any:
        imports = "".join(
            f"import * as {name} from {(PAGE / f'{name}.mjs').as_uri()!r};\n"
            for name in ("preprocess", "masks", "scene")
        )
        script = f"import fs from 'node:fs';\n{imports}let result = null;\n{code}\n"
        script += "console.log(JSON.stringify(result));"
        (tmp_path / "script.mjs").write_text(script)
        done = subprocess.run([program, "script.mjs"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
