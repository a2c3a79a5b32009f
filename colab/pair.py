"""Writes each notebook `colab/NAME.ipynb` from its text `colab/NAME.py`: run it after changing the text.

The text is what people edit and review (jupytext's percent format); the notebook is what Colab opens. It is written
without outputs and always the same way, so that a test can tell when it is out of date.
"""

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent


def notebook(text: Path) -> str:
    """The content of the ``.ipynb`` for a ``.py``."""
    made = jupytext.read(text)
    for i, cell in enumerate(made.cells):
        cell["id"] = f"cell-{i:02d}"  # jupytext draws them at random
    spec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made.metadata = {"kernelspec": spec, "language_info": {"name": "python"}}
    nbformat.validate(made)
    return nbformat.writes(made, version=4, indent=1) + "\n"


def texts() -> list[Path]:
    """The texts that have a notebook."""
    return sorted(path for path in FOLDER.glob("*.py") if path.name != Path(__file__).name)


if __name__ == "__main__":
    for path in texts():
        path.with_suffix(".ipynb").write_text(notebook(path), encoding="utf-8")
        print(path.with_suffix(".ipynb"))
