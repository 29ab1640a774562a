"""Does anything notice when the mathematics is wrong? Mutation testing of the mechanism modules,
or of others by name.

    python tests/mutation.py [module ...] [--per-function 6] [--seed 0] [--list]

A mutant is one exported function (or constant) with one mistake in it: a sign, an operator, a
factor of two, a missing term, a missing call, a comparison the wrong way round. It is killed if a
cell of the module's own notebook raises, or else if one of TESTS fails with the mutant in the
package. Printed outputs are not compared: an assertion has to fail. Survivors are printed, and
the exit status is 1 if there is one that EXPLAINED does not name.

The notebook runs once, in this process, and at every export cell forks a child for each mutant of
that cell: a mutant costs no more than the cells after it. The mechanisms take about ten minutes
on one core. What a mutant writes into temporary folders is undone.
"""

import argparse
import ast
import contextlib
import difflib
import functools
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import torch  # noqa: F401, once here and not in every child

import phase2.display

ROOT = Path(__file__).parent.parent
MECHANISMS = ["decay", "memory", "snr", "resonance", "stability", "consolidation"]
TESTS = {
    "test_memory.py": ["memory"],
    "test_consolidation.py": ["snr", "resonance", "consolidation"],
    "test_model.py": [*MECHANISMS, "model"],
    "test_training.py": ["training"],
    "test_inference.py": ["inference"],
    "test_diagnostics.py": ["diagnostics"],
    "test_checkpoints.py": ["checkpoints"],
}

# Mutants that no assertion can tell from the original, by name, and why.
EXPLAINED = {
    "stability.RESOLUTION: 0.0001 -> 0.0002": "a tolerance for rounding: c changes by 1e-4",
    "snr.RIDGE: 0.0001 -> 0.0002": "a tolerance for rounding: σ changes by 1e-4",
    "memory.memory_chunked: 64 -> 128": "changes the speed, not the result",
    "memory.as_complex: 2 -> 4": "a copy where a view would do",
    "memory.in_pairs: 2 -> 4": "a copy where a view would do",
    "memory.GONE: 700.0 -> 1400.0": "e^{-700} and e^{-1400} are both nothing",
    "memory.with_decays: within.to(q.dtype) -> within": "a product in place takes either dtype",
    "memory.turn_back: as_real(join_times(dx, spin.conj(), size)).to(dtype) -> "
    "as_real(join_times(dx, spin.conj(), size))": "autograd casts a gradient to its input's dtype",
    "consolidation.CHUNK: 64 -> 128": "changes the speed, not the result",
    "consolidation.remember: position > 0 or is_empty(state) -> position > 0 and is_empty(state)": (
        "changes the speed, not the result"
    ),
    "consolidation.remember: position > 0 -> position < 0": "changes the speed, not the result",
    "consolidation.TOGETHER: 32 -> 64": "changes the speed, not the result",
    "consolidation.ConsolidatedMemory.backward: 5 -> 10": "autograd drops a None too many",
    "consolidation.ConsolidatedMemory.forward: ctx.set_materialize_grads(False) -> pass": (
        "zeros in the place of None, and slower"
    ),
    **{
        f"memory.times: {change}": "runs when compiled; test_compiles fails, but it is slow"
        for change in (
            "return (x * factor).to(x.dtype).contiguous() -> "
            "return 2 * (x * factor).to(x.dtype).contiguous()",
            "x * factor -> factor",
            "x * factor -> x / factor",
        )
    },
    "snr.TINY: 1e-280 -> 2e-280": "any number that is not zero, for an empty memory",
    **{
        f"checkpoints.{change}": "names the same weights alike, and others not"
        for change in (
            "digest: return found.hexdigest() -> return 2 * found.hexdigest()",
            "identity: return hashlib.sha256(f'{digest(weights)}{config}'.encode()).hexdigest() -> "
            "return 2 * hashlib.sha256(f'{digest(weights)}{config}'.encode()).hexdigest()",
        )
    },
    "inference.PIECE: 1024 -> 2048": "changes the speed, not the result",
    "diagnostics.SNAPSHOTS: 128 -> 256": "a choice: how many a figure shows",
    "diagnostics.REACH: 512 -> 1024": "a choice: how far a window is measured",
    "diagnostics.plain: isinstance(value, float) -> value": "numbers and None are all it is given",
    "diagnostics.halved: 1 -> 2": "a row more than is looked at",
    "diagnostics.doubling: most.bit_length() -> most": "what is too large is left out anyway",
    "inference.answer: prompt[0].tolist() -> prompt[0]": "either is decoded",
    "diagnostics.equally_driven: 1.0 -> 2.0": "times the bound of an empty memory, 0",
    "training.evaluate_run: str(error) -> error": "formatted all the same",
    "training.new_accelerator: torch.cuda.is_available() -> torch.cuda": "needs a GPU",
    "training.rng_state: torch.cuda.get_rng_state() -> torch.cuda": "needs a GPU",
    "snr.snr_stats: (noise / fast_weights.shape[-1]).sqrt().to(wide) -> "
    "(noise / fast_weights.shape[-1]).sqrt()": "float64 where float32 would do",
    "model.SHORTEST: 1e-12 -> 2e-12": "any number far below the length of a key",
    "model.FEW: 64 -> 128": "changes the speed, not the result",
    "model.blend_back: previous(x, last, first).sub_(x).mul_(dmixed).sum((0, 1)) -> "
    "previous(x, last, first).sub_(x).mul_(dmixed)": "autograd sums to the shape of the input",
}

OPPOSITE = {
    **{ast.Add: ast.Sub, ast.Mult: ast.Div, ast.BitAnd: ast.BitOr, ast.And: ast.Or},
    **{ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot},
}
OPPOSITE |= {new: old for old, new in OPPOSITE.items()}
ARITHMETIC = ast.BinOp | ast.Compare | ast.arguments | ast.Assign | ast.Return
# Without the first four nothing changes but speed or type; without the others nothing runs.
KEPT_CALLS = {"contiguous", "item", "int", "bool", "range", "zip", "dict", "len", "type"}


@dataclass(frozen=True)
class Mutant:
    """One mistake: its kind, what stood there, what stands there now, and the cell with it."""

    module: str
    function: str
    kind: str
    before: str
    after: str
    cell: str
    source: str

    @property
    def name(self):
        return f"{self.module}.{self.function}: {self.before} -> {self.after}"


def mistakes(node, parent, imported):
    """(kind, node, replacement) for every mistake that can be made in a piece of code."""
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.arg):
        return  # messages and annotations compute nothing
    yield from ((kind, node, new) for kind, new in changes(node, parent, imported))
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in ("decorator_list", "annotation"):
                yield from mistakes(child, node, imported)


def changes(node, parent, imported):
    """(kind, replacement) for the mistakes at one node itself."""
    match node:
        case ast.BinOp(left, op, right):
            if opposite := OPPOSITE.get(type(op)):
                yield "operator", ast.BinOp(left, opposite(), right)
            if isinstance(op, ast.Add | ast.Sub | ast.Mult | ast.Div):
                yield from [("term", left), ("term", right)]
        case ast.AugAssign(target, op, value) if opposite := OPPOSITE.get(type(op)):
            yield "operator", ast.AugAssign(target, opposite(), value)
            yield "term", ast.Pass()
        case ast.UnaryOp(ast.USub() | ast.Not(), operand) if not isinstance(operand, ast.Constant):
            yield "sign", operand
        case ast.Constant(float() | int() as value) if value and not isinstance(value, bool):
            # other integers name a dimension or an index: doubling them is an error, not a mistake
            numeric = isinstance(value, float) or isinstance(parent, ARITHMETIC)
            if numeric or called(parent) == "clamp":
                yield "factor", ast.Constant(2 * value)
        case ast.Return(ast.BinOp() | ast.Call() as value):
            yield "factor", ast.Return(ast.BinOp(ast.Constant(2), ast.Mult(), value))
        case ast.Compare(left, [op], right) if opposite := OPPOSITE.get(type(op)):
            yield "comparison", ast.Compare(left, [opposite()], right)
        case ast.BoolOp(op, values):
            yield "comparison", ast.BoolOp(OPPOSITE[type(op)](), values)
        case ast.Expr(ast.Call()):
            yield "call", ast.Pass()
        case ast.Attribute(value, "mT"):
            yield "call", value
        case ast.Call(func, args) if not (
            isinstance(parent, ast.Expr) or called(node) in KEPT_CALLS
        ):
            method = isinstance(func, ast.Attribute) and ast.unparse(func.value) not in imported
            kept = func.value if method else args[0] if args else None
            if kept and not isinstance(kept, ast.Starred | ast.GeneratorExp):
                yield "call", kept


def called(node):
    """The name of the function that a node calls, or an empty one."""
    func = getattr(node, "func", None)
    return getattr(func, "attr", getattr(func, "id", ""))


def splice(source, node, new):
    """`source` with the text of one node replaced, every other character as it was."""
    data = source.encode()  # ast counts columns in bytes
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    start = starts[node.lineno - 1] + node.col_offset
    end = starts[node.end_lineno - 1] + node.end_col_offset
    text = ast.unparse(ast.fix_missing_locations(new))
    bare = isinstance(new, ast.stmt | ast.Name | ast.Constant | ast.Call)
    bare = bare or (data[start - 1 : start], data[end : end + 1]) == (b"(", b")")
    return (data[:start] + (text if bare else f"({text})").encode() + data[end:]).decode()


def definitions(source):
    """(name, node) of every function, method and constant of an export cell."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            methods = (n for n in node.body if isinstance(n, ast.FunctionDef))
            yield from ((f"{node.name}.{method.name}", method) for method in methods)
        elif isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            yield ast.unparse(node.targets[0]), node


def exports(notebook):
    return [c for c in notebook.cells if "export" in c.metadata.get("tags", [])]


def mutants(notebook, per_function=None, seed=0):
    """The mutants of a notebook's exports, for each function a sample, or all of them."""
    module, cells = notebook.metadata.phase2.module, exports(notebook)
    nodes = [n for c in cells for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.Import)]
    imported = {alias.asname or alias.name for node in nodes for alias in node.names}
    imported |= {"torch.linalg", "torch.compiler"}
    for cell in cells:
        for function, definition in definitions(cell.source):
            found = {}
            for kind, old, new in mistakes(definition, None, imported):
                source = splice(cell.source, old, new)
                texts = ast.unparse(old), ast.unparse(new)
                found[source] = Mutant(module, function, kind, *texts, cell.id, source)
            yield from sample(list(found.values()), per_function, f"{seed} {module}.{function}")


def sample(found, size, seed):
    """`size` of the mutants, always the same: one of each kind, then a second of each."""
    random.Random(seed).shuffle(found)
    seen, rank = Counter(), {}
    for mutant in found:
        rank[mutant] = seen[mutant.kind]
        seen[mutant.kind] += 1
    return sorted(found, key=rank.get)[:size]


def run_cell(cell, source, namespace):
    """Run a code cell; one tagged `raises-exception` has to raise."""
    must_raise = "raises-exception" in cell.metadata.get("tags", [])
    try:
        exec(compile(source, cell.id, "exec"), namespace)
    except Exception:
        if not must_raise:
            raise
    else:
        assert not must_raise, "nothing raised"


def run_original(cells, namespace=None):
    """Run code cells in this process, without a mistake."""
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for cell in cells:
            run_cell(cell, cell.source, namespace)


@contextlib.contextmanager
def restored(folder):
    """Afterwards the files in a folder are as they were."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        yield
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
    os.chdir(here)  # which may be another folder of the same name now


def run_mutant(cells, first, namespace, limit):
    """Run code cells in a forked child, the first with another source; returns what failed."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            signal.setitimer(signal.ITIMER_PROF, limit)  # processor time: others may be busy ...
            signal.alarm(int(10 * limit))  # ... and a deadlock takes none
            for fd in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
            for source, cell in zip([first, *(c.source for c in cells[1:])], cells):
                run_cell(cell, source, namespace)
        except BaseException as error:
            os.write(writing, f"{cell.id}: {type(error).__name__}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        failed = pipe.read()
    _, status = os.waitpid(child, 0)
    return "out of time" if os.WIFSIGNALED(status) else failed


@functools.cache
def run_tests(module, text):
    """The first of TESTS that fails with this text as the module, "" if none does."""
    named = [ROOT / "tests" / name for name, modules in TESTS.items() if module in modules]
    files = [str(path) for path in named if path.exists()]
    if not files:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "phase2", Path(folder) / "phase2")
        (Path(folder) / "phase2" / f"{module}.py").write_text(text, encoding="utf-8")
        options = ["-qx", "-p", "no:cacheprovider", "-k", "not compiles"]  # slow, and no formula
        command = [sys.executable, "-m", "pytest", *options, *files]
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONSAFEPATH": "1"}
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py\S*)", run.stdout, re.MULTILINE)
    return "" if run.returncode == 0 else failed[1] if failed else run.stdout[-400:]


def check(path, per_function=6, seed=0):
    """Yield (mutant, what killed it) for a notebook's sample of mutants that are not explained.

    What killed it is "" for a survivor.
    """
    notebook = nbformat.read(path, as_version=4)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    chosen = [m for m in mutants(notebook, per_function, seed) if m.name not in EXPLAINED]
    matplotlib.use("agg")
    quiet = {"explore": lambda *_, **__: None, "show": lambda figure, alt: plt.close(figure)}
    with (
        contextlib.chdir(path.parent),
        tempfile.TemporaryDirectory() as scratch,
        mock.patch("tempfile.tempdir", scratch),  # what notebooks write goes there
        mock.patch.multiple(phase2.display, **quiet),
        mock.patch("myst_nb.glue", lambda *_, **__: None),
    ):
        seconds = time.process_time()
        run_original(cells)  # it must pass; it also imports now what children would import again
        os.chdir(path.parent)  # wherever it has gone
        seconds = time.process_time() - seconds
        namespace = {"__name__": "__main__"}
        for i, cell in enumerate(cells):
            for mutant in (m for m in chosen if m.cell == cell.id):
                with restored(scratch):
                    killer = run_mutant(cells[i:], mutant.source, namespace, 30 + 2 * seconds)
                yield mutant, killer or killed_by_tests(notebook, mutant)
            run_original([cell], namespace)


def killed_by_tests(notebook, mutant):
    """The test that fails with the mutant in the package, "" if none does."""
    texts = {c.id: c.source for c in exports(notebook)}
    if failed := run_tests(mutant.module, "\n\n\n".join(texts.values())):
        raise RuntimeError(f"a test fails without a mutant: {failed}")
    texts[mutant.cell] = mutant.source
    return run_tests(mutant.module, "\n\n\n".join(texts.values()))


def difference(notebook, mutant):
    before = next(c.source for c in exports(notebook) if c.id == mutant.cell)
    lines = difflib.unified_diff(before.split("\n"), mutant.source.split("\n"), lineterm="", n=0)
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("---", "+++")]
    return "\n".join([f"{mutant.name}    (cell {mutant.cell})", *(f"    {x}" for x in changed)])


def report(path, per_function, seed):
    """Print a notebook's table, one line a function; returns the survivors as text."""
    notebook = nbformat.read(path, as_version=4)
    rows, survivors = {}, []
    for mutant in mutants(notebook, per_function, seed):
        rows.setdefault(mutant.function, Counter())["explained"] += mutant.name in EXPLAINED
    for mutant, killer in check(path, per_function, seed):
        print(f"  {mutant.name:100.100} {killer or 'SURVIVED'}", file=sys.stderr, flush=True)
        rows[mutant.function]["killed" if killer else "survived"] += 1
        if not killer:
            survivors.append(difference(notebook, mutant))
    print(f"\n{notebook.metadata.phase2.module:36}{'killed':>10}{'survived':>10}{'explained':>10}")
    for function, row in rows.items():
        numbers = (row[column] for column in ("killed", "survived", "explained"))
        print(f"  {function:34}" + "".join(f"{number:10}" for number in numbers))
    return survivors


def main():
    """The command line; see the top of the file."""
    paths = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        module = nbformat.read(path, as_version=4).metadata.get("phase2", {}).get("module")
        paths[module] = path
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", default=MECHANISMS, metavar="module")
    parser.add_argument("--per-function", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the mutants and run none")
    args = parser.parse_args()
    if unknown := [module for module in args.modules if module not in paths]:
        parser.error(f"no notebook exports {', '.join(unknown)}")
    survivors = []
    for module in args.modules:
        if args.list:
            notebook = nbformat.read(paths[module], as_version=4)
            print(*(m.name for m in mutants(notebook, args.per_function, args.seed)), sep="\n")
        else:
            survivors += report(paths[module], args.per_function, args.seed)
    print(*(f"\nsurvived: {text}" for text in survivors), sep="\n")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
