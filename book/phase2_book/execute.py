"""Run notebooks in place and store outputs that do not depend on the machine that ran them."""

import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

TIMEOUT = 300  # seconds a cell may take
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {
    "name": "python",
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "pygments_lexer": "ipython3",
}
WIDGET = "application/vnd.jupyter.widget-view+json"
# They start at the start of a word: tried everywhere, a picture of 1 MB would take minutes.
CELL_FILE = re.compile(r"(?<![^\s\"'])[^\s\"']*ipykernel_\d+[/\\]\d+\.py")
LIBRARY = re.compile(
    r"(?:(?<![\w.+/-])|(?<=\x1b\[\d\dm))"  # a traceback colors its paths
    r"~?(?:/[\w.+-]+)*/(?:site-packages|lib/python3\.\d+)/"
)


def portable(value, root: str):
    """`value` (nested lists, dicts and strings) without widgets and machine paths."""
    if isinstance(value, str):
        return LIBRARY.sub("", CELL_FILE.sub("cell", value)).replace(root, "")
    if isinstance(value, list):
        return [portable(item, root) for item in value]
    if isinstance(value, dict):
        kept = {key: portable(item, root) for key, item in value.items() if key != WIDGET}
        return nbformat.from_dict(kept)
    return value


def clean(notebook: nbformat.NotebookNode, root: Path) -> None:
    """Remove what differs from run to run: widget state, versions, timings and paths."""
    notebook.metadata.pop("widgets", None)  # a saved view has no state to show without its kernel
    notebook.metadata.kernelspec = nbformat.from_dict(KERNEL)
    notebook.metadata.language_info = nbformat.from_dict(LANGUAGE)
    for cell in notebook.cells:
        for volatile in ("execution", "ExecuteTime", "collapsed", "scrolled", "trusted"):
            cell.metadata.pop(volatile, None)
        if cell.cell_type == "code":
            outputs = (portable(output, f"{root}/") for output in cell.outputs)
            cell.outputs = [output for output in outputs if output.get("data") != {}]


def execute(path: Path) -> bool:
    """Run one notebook from its own folder and save it; returns whether the file changed."""
    before = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(before, as_version=4)
    NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    clean(notebook, root=path.parent.parent)
    nbformat.validate(notebook)
    after = nbformat.writes(notebook) + "\n"
    if after != before:
        path.write_text(after, encoding="utf-8", newline="\n")
    return after != before


def main() -> None:
    if not sys.argv[1:]:
        sys.exit("usage: python -m phase2_book.execute NOTEBOOK...")
    for name in sys.argv[1:]:
        start = time.perf_counter()
        try:
            changed = execute(Path(name).resolve())
        except CellExecutionError as error:
            sys.exit(f"{name}: {error}")
        seconds = time.perf_counter() - start
        print(f"{seconds:6.1f} s  {name}{'  (changed)' if changed else ''}", flush=True)


if __name__ == "__main__":
    main()
