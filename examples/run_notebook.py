"""Run a notebook from its first cell to its last, and write it with its outputs.

python examples/run_notebook.py examples/quickstart.ipynb          # writes the outputs into it
python examples/run_notebook.py examples/quickstart.ipynb out.ipynb

Needs nbclient and ipykernel (`pip install 'mobilesam[test]'`). The notebook runs in its own folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run_notebook(notebook: Path, out: Path) -> nbformat.NotebookNode:
    """Run all cells in a new kernel of this Python, and write the notebook with outputs that are alike everywhere.

    Args:
        notebook: the notebook; relative paths in its cells start at its folder.
        out: file to write, which may be the notebook itself.

    Returns:
        The notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has its code and the traceback.
    """
    content = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(notebook.resolve().parent)}}
    client = NotebookClient(content, timeout=None, kernel_name="python3", resources=resources)
    client.execute()
    content.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    for cell in content.cells:
        cell.metadata.pop("execution", None)  # times of each cell
        if cell.cell_type == "code":  # progress bars and warnings, which name this machine's folders
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(content, out)
    return content


if __name__ == "__main__":
    source = Path(sys.argv[1])
    run_notebook(source, Path(sys.argv[2]) if len(sys.argv) > 2 else source)
