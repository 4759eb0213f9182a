"""Runs the notebooks, stores their outputs, and updates the figures in images/, which the project's README shows.

    python notebooks/execute.py                   all of them, after the model or the code has changed
    python notebooks/execute.py 03_llama.ipynb    only the given ones

The cell tagged "readme-NAME" produces images/NAME.png.
"""

import base64
import sys
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).parent


def readme_figures(notebook: nbformat.NotebookNode) -> dict[str, bytes]:
    """{"NAME.png": the figure of the cell tagged "readme-NAME"}."""
    found = {}
    for cell in notebook.cells:
        names = [tag.removeprefix("readme-") for tag in cell.metadata.get("tags", []) if tag.startswith("readme-")]
        shown = [output.data for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        found |= {f"{name}.png": base64.b64decode(shown[0]["image/png"]) for name in names}
    return found


def main() -> None:
    """The command line."""
    for path in [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("[0-9]*.ipynb")):
        print(path.name, file=sys.stderr)
        notebook = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(notebook, resources={"metadata": {"path": HERE}}, record_timing=False).execute()
        nbformat.write(notebook, path)
        for name, image in readme_figures(notebook).items():
            (HERE / "images" / name).write_bytes(image)


if __name__ == "__main__":
    main()
