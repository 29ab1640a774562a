"""The mutator of mutation.py on a toy notebook: it makes the mistakes it says and sees them die."""

from pathlib import Path

import mutation
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

EXPORT = '''\
import math

LIMIT = 0.5


def area(width, height):
    """Γ, to check that columns are counted in bytes."""
    Γ = abs(width) * height
    return Γ


def wave(x):
    return math.sin(-x) + min(LIMIT, 1.0)


class Box:
    def grow(self, x):
        x += 1
        if not x > 0:
            raise ValueError("x + 1 must be positive")
        return x.clamp(0, 3)
'''
CHECKS = """\
assert area(2.0, 4.0) == 8.0
try:
    wave(None)
except TypeError:
    pass
"""


@pytest.fixture
def notebook(tmp_path):
    cells = [new_code_cell(EXPORT, id="export"), new_code_cell(CHECKS, id="checks")]
    cells[0].metadata.tags = ["export"]
    cells.append(new_code_cell("assert area(0, 1)", id="fails"))
    cells[2].metadata.tags = ["raises-exception"]
    toy = new_notebook(cells=cells, metadata={"phase2": {"module": "toy"}})
    nbformat.write(toy, tmp_path / "toy.ipynb")
    return toy


def names(mutants):
    return {mutant.name.removeprefix("toy.") for mutant in mutants}


def test_mistakes(notebook):
    found = names(mutation.mutants(notebook))
    assert found >= {
        "LIMIT: 0.5 -> 1.0",
        "area: abs(width) * height -> abs(width) / height",
        "area: abs(width) * height -> abs(width)",
        "area: abs(width) -> width",
        "wave: -x -> x",
        "wave: 1.0 -> 2.0",
        "wave: math.sin(-x) + min(LIMIT, 1.0) -> math.sin(-x) - min(LIMIT, 1.0)",
        "wave: return math.sin(-x) + min(LIMIT, 1.0) -> "
        "return 2 * (math.sin(-x) + min(LIMIT, 1.0))",
        "Box.grow: x += 1 -> x -= 1",
        "Box.grow: x += 1 -> pass",
        "Box.grow: x > 0 -> x < 0",
        "Box.grow: not x > 0 -> x > 0",
        "Box.grow: x.clamp(0, 3) -> x",
        "Box.grow: 3 -> 6",
    }
    assert not [name for name in found if "must be positive" in name]  # no message is changed


def test_one_place_changes(notebook):
    for mutant in mutation.mutants(notebook):
        pairs = list(zip(EXPORT.split("\n"), mutant.source.split("\n"), strict=True))
        assert sum(a != b for a, b in pairs) == 1, mutant.name
        compile(mutant.source, mutant.name, "exec")


def test_sample(notebook):
    few = mutation.mutants(notebook, per_function=2)
    assert names(few) == names(mutation.mutants(notebook, per_function=2))
    assert names(few) < names(mutation.mutants(notebook))
    assert len({m.kind for m in mutation.mutants(notebook, 3) if m.function == "wave"}) == 3


def test_verdicts(notebook, tmp_path, monkeypatch):
    monkeypatch.setitem(mutation.EXPLAINED, "toy.LIMIT: 0.5 -> 1.0", "nobody looks at it")
    verdicts = {m.name: killer for m, killer in mutation.check(tmp_path / "toy.ipynb", None)}
    assert verdicts["toy.area: abs(width) * height -> abs(width)"] == "checks: AssertionError"
    assert verdicts["toy.wave: -x -> x"] == ""  # the call fails either way, as it should
    assert "toy.LIMIT: 0.5 -> 1.0" not in verdicts


def test_a_mutant_may_raise_too_little(notebook, tmp_path):
    notebook.cells[0].source = "def half(x):\n    return 1 / x"
    notebook.cells[1].source = "pass"
    notebook.cells[2].source = "half(0)"
    nbformat.write(notebook, tmp_path / "toy.ipynb")
    verdicts = {m.name: killer for m, killer in mutation.check(tmp_path / "toy.ipynb", None)}
    assert verdicts["toy.half: 1 / x -> 1 * x"] == "fails: AssertionError"
    assert verdicts["toy.half: 1 -> 2"] == ""


def test_an_endless_mutant_is_ended(notebook):
    cell = notebook.cells[1]
    assert mutation.run_mutant([cell], "while True: pass", {}, limit=0.2) == "out of time"


def test_a_failing_notebook_is_refused(notebook, tmp_path):
    notebook.cells[1].source = "raise OSError"
    nbformat.write(notebook, tmp_path / "toy.ipynb")
    with pytest.raises(OSError):
        list(mutation.check(tmp_path / "toy.ipynb"))


def test_explained_mutants_exist():
    """A reason for a mutant that can no longer be made is to be removed."""
    paths = (mutation.ROOT / "notebooks").glob("*.ipynb")
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    exporting = [notebook for notebook in notebooks if "phase2" in notebook.metadata]
    made = {mutant.name for notebook in exporting for mutant in mutation.mutants(notebook)}
    assert not mutation.EXPLAINED.keys() - made


def test_what_a_mutant_writes_is_gone(tmp_path, monkeypatch):
    (tmp_path / "old").write_text("as it was")
    monkeypatch.chdir(tmp_path)
    with mutation.restored(tmp_path):
        (tmp_path / "old").write_text("changed")
        (tmp_path / "new").touch()
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [("old", "as it was")]
