"""Save the picture that a notebook cell shows as a file, for places where no notebook is rendered.

python -m phase2_book.picture notebooks/01_decay.ipynb picture book/assets/picture.png
"""

import base64
import re
import sys
from pathlib import Path

import nbformat

_PICTURE = re.compile(r'<img[^>]* src="data:image/png;base64,([A-Za-z0-9+/=]+)"')


def cell_picture(notebook, cell_id):
    """The first picture among a cell's stored outputs, as the bytes of a PNG.

    Args:
        notebook: path of the notebook.
        cell_id: id of the cell; of a slider's pictures it is the one first seen.

    Raises:
        ValueError: if there is no such cell or it shows no picture.
    """
    cells = nbformat.reads(Path(notebook).read_text(encoding="utf-8"), 4).cells
    outputs = [out for cell in cells if cell.id == cell_id for out in cell.get("outputs", [])]
    for output in outputs:
        found = _PICTURE.search(output.get("data", {}).get("text/html", ""))
        if found:
            return base64.b64decode(found[1])
    raise ValueError(f"{notebook} has no cell {cell_id!r} with a stored picture")


if __name__ == "__main__":
    source, cell, target = sys.argv[1:]
    Path(target).write_bytes(cell_picture(source, cell))
