"""The executor: what it stores is the same on every machine, and it stores a failure nowhere."""

import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from phase2_book import execute

ROOT = "/home/reader/phase2/"
STORED = {
    "/tmp/ipykernel_17/2345.py:3: UserWarning: x": "cell:3: UserWarning: x",
    f"File {ROOT}phase2/decay.py:7": "File phase2/decay.py:7",
    "File \x1b[32m/usr/lib/python3.11/json/decoder.py:3": "File \x1b[32mjson/decoder.py:3",
    "File \x1b[32m~/v/lib/python3.13/site-packages/torch/a.py": "File \x1b[32mtorch/a.py",
    "Γ / (2 V) = 1/2": "Γ / (2 V) = 1/2",
}


@pytest.mark.parametrize("printed", STORED)
def test_paths_are_portable(printed):
    assert execute.portable({"text": [printed]}, ROOT) == {"text": [STORED[printed]]}


@pytest.mark.timeout(20)
def test_a_large_picture_is_no_burden():
    picture = "ab/cd+" * 200_000
    assert execute.portable(picture, ROOT) == picture


def test_notebook_is_stored_clean_and_only_when_it_changed(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    source = "import os\nfrom ipywidgets import IntSlider\nprint(os.getcwd())\nIntSlider(2)"
    cell = new_code_cell(source, id="slider")
    path = folder / "one.ipynb"
    nbformat.write(new_notebook(cells=[cell, new_code_cell("1 + 1", id="sum")]), path)
    assert execute.execute(path)
    notebook = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in notebook.cells] == [1, 2]
    printed, slider = notebook.cells[0].outputs
    assert printed.text == "notebooks\n"
    assert slider.data == {"text/plain": "IntSlider(value=2)"}
    assert "widgets" not in notebook.metadata
    assert "version" not in notebook.metadata.language_info
    assert not execute.execute(path)


def test_a_failing_notebook_is_named_and_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "broken.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0", id="boom")]), path)
    before = path.read_bytes()
    monkeypatch.setattr(sys, "argv", ["execute", str(path)])
    with pytest.raises(SystemExit, match="(?s)broken.ipynb.*ZeroDivisionError"):
        execute.main()
    assert path.read_bytes() == before
