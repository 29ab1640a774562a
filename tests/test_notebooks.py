"""The form of every notebook: executed in order, readable ids, nothing of the machine in it."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
ABSOLUTE_PATH = re.compile(r"(?<![\w:/.<])/(?:home|root|Users|usr|tmp|var|opt|work|private|mnt)/\w")
RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){0,3}(-?[0-9a-f]{12})?")
WIDGET = "application/vnd.jupyter.widget"


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    nb = nbformat.read(request.param, as_version=4)
    nbformat.validate(nb)
    return nb


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in code_cells(notebook) if tag in cell.metadata.get("tags", [])]


def output_text(cell):
    """Everything a cell stored except pictures, whose base64 may hold any letters."""
    for output in cell.outputs:
        shown = {mime: data for mime, data in output.get("data", {}).items() if "image" not in mime}
        text = json.dumps({**output, "data": shown})
        text = re.sub(r"\\u001b\[[\d;]*m", " ", text)  # a traceback colors its paths
        yield re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)


def test_measured_numbers_in_prose_are_committed_results(notebook):
    results = (Path(__file__).parent / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    measured = r"(\d+(?:\.\d+)?)\s*±\s*(\d+(?:\.\d+)?)"
    assert not {*re.findall(measured, prose)} - {*re.findall(measured, results)}


def test_kernel_is_named_and_no_version_is(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.name == "python"
    assert "version" not in notebook.metadata.language_info


def test_every_code_cell_was_executed_in_order(notebook):
    cells = code_cells(notebook)
    assert cells
    assert all(cell.source.strip() for cell in cells)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


def test_ids_are_unique_and_readable(notebook):
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert not [cell_id for cell_id in ids if RANDOM_ID.fullmatch(cell_id)]


def test_no_widget_state_is_stored(notebook):
    assert "widgets" not in notebook.metadata
    mimes = [
        mime
        for cell in code_cells(notebook)
        for out in cell.outputs
        for mime in out.get("data", [])
    ]
    assert not [mime for mime in mimes if mime.startswith(WIDGET)]


def test_outputs_name_no_path_of_a_machine(notebook):
    for cell in code_cells(notebook):
        for text in output_text(cell):
            assert not ABSOLUTE_PATH.search(text), (cell.id, ABSOLUTE_PATH.search(text))


def test_no_timing_is_stored(notebook):
    assert not [cell.id for cell in code_cells(notebook) if "execution" in cell.metadata]


def test_errors_are_announced(notebook):
    """A cell fails only where its tag says that it will."""
    failed = {
        c.id for c in code_cells(notebook) if any(o.output_type == "error" for o in c.outputs)
    }
    assert failed == {cell.id for cell in tagged(notebook, "raises-exception")}


def test_glued_numbers_have_the_digits_that_are_shown(notebook):
    """Later ones differ from one processor to another, and nbval compares them all."""
    ignored = tagged(notebook, "nbval-ignore-output")
    for cell in code_cells(notebook):
        for output in cell.outputs if cell not in ignored else ():
            number = output.get("data", {}).get("application/papermill.record/text/plain", "")
            assert len(re.sub(r"\D", "", number)) <= 5, (cell.id, number)


def imported(notebook):
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                yield from ((alias.name, cell.id) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module, cell.id


def test_no_notebook_imports_tests_or_the_books_tools(notebook):
    roots = {name.split(".")[0]: cell_id for name, cell_id in imported(notebook)}
    assert not roots.keys() & {"tests", "conftest", "phase2_book"}
