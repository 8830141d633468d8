"""Run the notebook beside this file from top to bottom and store it with its outputs.

    python examples/quickstart/run_notebook.py

Its run folder, `examples/quickstart/runs/`, must not exist. Needs the `test` extra.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
NOTEBOOK = HERE / "quickstart.ipynb"
CHECKOUT = HERE.parents[1]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def main() -> None:
    notebook = run(nbformat.read(NOTEBOOK, as_version=4), HERE)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                output.text = portable(output.text)
    nbformat.write(notebook, NOTEBOOK)


def run(notebook: NotebookNode, folder: Path, **parameters: Any) -> NotebookNode:
    """Execute the notebook in `folder`, with values assigned after the cell tagged `parameters`.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    client = NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    return client.execute()


def portable(text: str) -> str:
    """The text as a terminal ends up showing it, with paths relative to the checkout."""
    lines = ESCAPES.sub("", text).replace("\r\n", "\n").split("\n")
    shown = (next((part for part in reversed(line.split("\r")) if part.strip()), "").rstrip() for line in lines)
    return "\n".join(shown).replace(f"{CHECKOUT}/", "")


if __name__ == "__main__":
    main()
