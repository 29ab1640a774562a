"""The exporter: what it writes, and that it refuses what would make a broken module."""

import re
import subprocess
import sys
import traceback
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from phase2_book import exporter

REPOSITORY = Path(__file__).parent.parent
GOOD = "import math\n\n\ndef half(x):\n    return math.sqrt(x) / 2"


def write_notebook(root, *cells, name="01_decay", module="decay"):
    """A notebook of export cells, given as (id, source)."""
    notebook = new_notebook(cells=[new_markdown_cell("# What is `half` of it?", id="intro")])
    if module:
        notebook.metadata["phase2"] = {"module": module}
    for cell_id, source in cells:
        cell = new_code_cell(source, id=cell_id, metadata={"tags": ["export"]})
        notebook.cells.append(cell)
    nbformat.write(notebook, root / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "phase2").mkdir()
    return tmp_path


def run(root, *options, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["exporter", "--root", str(root), *options])
    exporter.main()


@pytest.fixture
def export(root, monkeypatch):
    return lambda *options: run(root, *options, monkeypatch=monkeypatch)


def refusal(export, root, *options):
    """The message of a refused run, after making sure that it changed nothing under phase2/."""
    before = {path: path.read_bytes() for path in (root / "phase2").iterdir()}
    with pytest.raises(SystemExit) as stopped:
        export(*options)
    assert {path: path.read_bytes() for path in (root / "phase2").iterdir()} == before
    return str(stopped.value)


REFUSED = {
    "line magic": ("import math\n%timeit math.pi", 2, "magic"),
    "cell magic": ("%%time\nX = 1", 1, "magic"),
    "shell": ("X = 1\n!ls", 2, "magic"),
    "assigned magic": ("X = 1\nY = !ls", 2, "magic"),
    "help": ("import math\nmath.pi?", 2, "magic"),
    "syntax": ("X = 1\n\ndef f(:\n    pass", 3, "syntax error"),
    "unclosed": ("X = 1\nY = (2", 2, "syntax error"),
    "return outside": ("X = 1\nreturn X", 2, "syntax error"),
    "duplicate function": ("def f(): ...\n\ndef f(): ...", 3, "duplicate name `f`"),
    "duplicate constant": ("X = 1\nX = 2", 2, "duplicate name `X`"),
    "import over function": ("def sqrt(): ...\nfrom math import sqrt", 2, "duplicate name `sqrt`"),
    "two imports, one name": ("import math as m\nimport cmath as m", 2, "duplicate name `m`"),
    "call": ("X = 1\nprint(X)", 2, "stray statement `print(X)`"),
    "loop": ("for i in range(3):\n    pass", 1, "stray statement `for i in range(3):`"),
    "variable": ("X = 1\nresult = X + 1", 2, "stray statement `result = X + 1`"),
    "patched class": ("class A: ...\n\nA.f = len", 3, "stray statement `A.f = len`"),
    "names itself": ("__all__ = []", 1, "stray statement `__all__ = []`"),
    "undefined": ("def f():\n    return torch.ones(1)", 2, "Undefined name `torch`"),
    "undefined in a class": ("class A:\n    x: Missing = None", 2, "Undefined name `Missing`"),
    "two on a line": ("import math; X = 1", 1, "Multiple statements"),
    "star": ("from math import *", 1, "star import"),
    "relative": ("from .memory import scan", 1, "relative"),
    "imports itself": ("X = 1\nfrom phase2.decay import half", 2, "phase2.decay imports itself"),
    "imports itself whole": ("from phase2 import decay", 1, "phase2.decay imports itself"),
    "long class": ("class A:\n" + "\n".join(f"    x{i} = {i}" for i in range(40)), 41, "41 lines"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_names_notebook_cell_and_line(case, export, root):
    source, line, why = REFUSED[case]
    write_notebook(root, ("half", GOOD), name="00_good", module="good")
    write_notebook(root, ("first", "A_CONSTANT = 0"), ("the-cell", source))
    message = refusal(export, root)
    assert f"notebooks/01_decay.ipynb#the-cell, line {line}: " in message
    assert why in message


def test_duplicate_across_cells_names_the_second(export, root):
    write_notebook(root, ("first", GOOD), ("second", "X = 1\n\n" + GOOD))
    message = refusal(export, root)
    assert "notebooks/01_decay.ipynb#second, line 6: duplicate name `half`" in message


def test_class_cannot_be_split(export, root):
    write_notebook(root, ("a", "class A:\n    x = 1"), ("b", "class A(A):\n    y = 2"))
    message = refusal(export, root)
    assert "notebooks/01_decay.ipynb#b, line 1: duplicate name `A`" in message


@pytest.mark.parametrize("options", [[], ["--check"]])
def test_unowned_module_is_refused(options, export, root):
    write_notebook(root, ("half", GOOD))
    (root / "phase2" / "__init__.py").write_text("")
    (root / "phase2" / "extra.py").write_text("X = 1\n")
    message = refusal(export, root, *options)
    assert "phase2/extra.py, line 1: no notebook owns this module" in message


def test_two_notebooks_cannot_write_one_module(export, root):
    write_notebook(root, ("half", GOOD), name="01_a")
    write_notebook(root, ("half", GOOD), name="02_b")
    assert "02_b.ipynb and 01_a.ipynb both export phase2.decay" in refusal(export, root)


@pytest.mark.parametrize("module", ["display", "__init__", "a-b"])
def test_module_name_is_refused(module, export, root):
    write_notebook(root, ("half", GOOD), module=module)
    assert f"notebooks/01_decay.ipynb: a notebook cannot write a module named {module!r}" in (
        refusal(export, root)
    )


def test_tag_and_metadata_come_together(export, root):
    write_notebook(root, ("half", GOOD), module=None)
    assert "notebooks/01_decay.ipynb#half, line 1: tagged export" in refusal(export, root)
    write_notebook(root)
    assert "notebooks/01_decay.ipynb: no cell is tagged export" in refusal(export, root)


def test_nothing_to_export_is_refused(export, root):
    assert "exports a module" in refusal(export, root)


CELLS = [
    ("imports", "import torch\nfrom math import pi, tau"),
    ("size", "from math import (\n    e,\n    pi,\n)\nSIZE: int = 3\n'Planes.'\n_HIDDEN = pi"),
    ("half", "import torch.nn.functional as F\nimport torch\n\ndef half(x):\n  return F.relu(x)/2"),
    ("decay", "from __future__ import annotations\nclass Decay(torch.nn.Module):\n    x = tau + e"),
]
WRITTEN = '''\
# Generated from notebooks/01_decay.ipynb; edit the notebook, not this file.
"""What is half of it?"""

from __future__ import annotations

from math import e, pi, tau

import torch
import torch.nn.functional as F

__all__ = ["SIZE", "half", "Decay"]


# %% notebooks/01_decay.ipynb#size
SIZE: int = 3
"Planes."
_HIDDEN = pi


# %% notebooks/01_decay.ipynb#half
def half(x):
    return F.relu(x) / 2


# %% notebooks/01_decay.ipynb#decay
class Decay(torch.nn.Module):
    x = tau + e
'''


def test_written_module(export, root):
    write_notebook(root, *CELLS)
    export()
    assert (root / "phase2" / "decay.py").read_text(encoding="utf-8") == WRITTEN
    export("--check")


def test_export_is_idempotent_and_leaves_equal_files_alone(export, root, capsys):
    write_notebook(root, *CELLS)
    export()
    stamp = (root / "phase2" / "decay.py").stat().st_mtime_ns
    assert "wrote" in capsys.readouterr().out
    export()
    assert (root / "phase2" / "decay.py").stat().st_mtime_ns == stamp
    assert capsys.readouterr().out == ""


def test_only_tagged_code_cells_are_exported(export, root):
    write_notebook(root, ("half", GOOD))
    path = root / "notebooks" / "01_decay.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(new_code_cell("%timeit half(2)\nprint(half(2))", id="example"))
    notebook.cells.append(new_markdown_cell("text", id="aside", metadata={"tags": ["export"]}))
    nbformat.write(notebook, path)
    export()
    assert "print" not in (root / "phase2" / "decay.py").read_text(encoding="utf-8")


def test_stale_module_is_reported_then_removed(export, root):
    write_notebook(root, ("half", GOOD))
    write_notebook(root, ("half", GOOD), name="02_gone", module="gone")
    export()
    (root / "notebooks" / "02_gone.ipynb").unlink()
    assert "phase2/gone.py: stale" in refusal(export, root, "--check")
    export()
    assert [path.name for path in (root / "phase2").iterdir()] == ["decay.py"]


def test_check_reports_a_missing_module(export, root):
    write_notebook(root, ("half", GOOD))
    assert "phase2/decay.py: missing" in refusal(export, root, "--check")


EDITS = {
    "a changed line": ("    return F.relu(x) / 2", "    return F.relu(x) / 3", 22, "half, line 2"),
    "an added line": ("_HIDDEN = pi\n", "_HIDDEN = pi\nY = 1\n", 18, "size, line 4"),
    "a line at the end": ("    x = tau + e\n", "    x = tau + e\n    y = 1\n", 28, "decay, line 3"),
    "a removed end": ("    x = tau + e\n", "", 27, "decay, line 2"),
    "the imports": ("import torch\n", "import torch, os\n", 8, "above its first cell"),
    "line endings": ("\n", "\r\n", 1, "above its first cell"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_check_finds_a_hand_edit(edit, export, root):
    old, new, line, place = EDITS[edit]
    write_notebook(root, *CELLS)
    export()
    path = root / "phase2" / "decay.py"
    path.write_bytes(path.read_text(encoding="utf-8").replace(old, new).encode())
    message = refusal(export, root, "--check")
    assert message.startswith(f"phase2/decay.py, line {line}: not what the notebook says")
    assert re.search(rf"\((notebooks/01_decay.ipynb#)?{place}\)", message)
    export()
    assert path.read_text(encoding="utf-8") == WRITTEN


def test_traceback_leads_to_the_cell(export, root):
    write_notebook(root, ("half", GOOD), ("fail", "def fail():\n    raise KeyError('here')"))
    export()
    path = root / "phase2" / "decay.py"
    module = {}
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), module)
    with pytest.raises(KeyError) as raised:
        module["fail"]()
    line = traceback.extract_tb(raised.value.__traceback__)[-1].lineno
    above = path.read_text(encoding="utf-8").splitlines()[:line]
    marker = [text for text in above if text.startswith("# %% ")][-1]
    assert marker == "# %% notebooks/01_decay.ipynb#fail"


@pytest.mark.parametrize("damage", [lambda text: "<<<<<<< HEAD\n" + text, lambda text: text[:99]])
def test_a_damaged_notebook_is_named(damage, export, root):
    write_notebook(root, *CELLS)
    path = root / "notebooks" / "01_decay.ipynb"
    path.write_text(damage(path.read_text(encoding="utf-8")))
    assert "refused: notebooks/01_decay.ipynb: no notebook (" in refusal(export, root)


def test_nbconvert_finds_the_exporter(root):
    write_notebook(root, *CELLS)
    notebook = str(root / "notebooks" / "01_decay.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--to", "phase2", notebook]
    subprocess.run([*command, "--output-dir", str(root / "phase2")], check=True)
    assert (root / "phase2" / "decay.py").read_text(encoding="utf-8") == WRITTEN


def test_repository_is_what_its_notebooks_say(monkeypatch):
    run(REPOSITORY, "--check", monkeypatch=monkeypatch)
