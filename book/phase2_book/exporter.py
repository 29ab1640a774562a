"""Write the package from the notebooks: cells tagged `export` become `phase2/<module>.py`.

Every notebook is converted in memory first. One that breaks a rule is refused, with its name, cell
and line, and nothing is written.
"""

import argparse
import ast
import re
import sys
from itertools import zip_longest
from pathlib import Path

from nbconvert.exporters import Exporter
from nbformat import ValidationError
from nbformat.reader import NotJSONError

from phase2_book.rules import Refused, definitions, imports, lint, parse, refuse, ruff

HAND_WRITTEN = {"__init__", "__main__", "cli", "display"}
HEADER = "# Generated from notebooks/"


def convert(cells: dict[str, str], module: str, title: str) -> str:
    """The text of a module, from its export cells by place ("notebooks/NAME.ipynb#ID")."""
    bound, pieces = {}, []  # bound: name -> its import statement, None if it is defined here
    for where, source in cells.items():
        lines = source.split("\n")
        for node in parse(source, where):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found = imports(node, module, where)
                for row in range(node.lineno - 1, node.end_lineno):
                    lines[row] = ""
            else:
                found = definitions(node, where)
            for name, statement in found.items():
                if name in bound and (statement is None or bound[name] != statement):
                    refuse(where, node.lineno, f"duplicate name `{name}`")
            bound |= found
        if body := "\n".join(lines).strip("\n"):
            pieces.append(f"\n\n# %% {where}\n{body}")
    lint(cells)
    public = [name for name in bound if bound[name] is None and not name.startswith("_")]
    merged = sorted(filter(None, bound.values()))
    text = "\n".join([f'"""{title}"""', *merged, f"__all__ = {public}", *pieces])
    return ruff("format", ruff("check --select=I --fix", text))


def convert_notebook(notebook, path: str) -> str:
    """The text of the module that a notebook exports, or "" if it exports none."""
    module = notebook.metadata.get("phase2", {}).get("module", "")
    tagged = [cell for cell in notebook.cells if "export" in cell.metadata.get("tags", [])]
    cells = {f"{path}#{cell.id}": cell.source for cell in tagged if cell.cell_type == "code"}
    if cells and not module:
        refuse(next(iter(cells)), 1, "tagged export, but the notebook's metadata names no module")
    if module and not cells:
        raise Refused(f"{path}: no cell is tagged export, but the metadata names module {module!r}")
    if module and not (module.isidentifier() and module not in HAND_WRITTEN):
        raise Refused(f"{path}: a notebook cannot write a module named {module!r}")
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    title = re.search(r"^# +(.+)$", f"{prose}\n# {module}", re.MULTILINE)[1]
    title = re.sub(r'[\\"$*`]', "", title).strip(" .")
    title += "" if title.endswith(("?", "!")) else "."
    header = f"{HEADER}{Path(path).name}; edit the notebook, not this file.\n"
    return header + convert(cells, module, title) if module else ""


class ModuleExporter(Exporter):
    """Notebook in, module out: `jupyter nbconvert --to phase2 --output-dir phase2 NOTEBOOK`."""

    file_extension = ".py"
    output_mimetype = "text/x-python"

    def from_notebook_node(self, nb, resources=None, **options):
        nb, resources = super().from_notebook_node(nb, resources, **options)
        name = resources["metadata"]["name"]
        resources["unique_key"] = nb.metadata.get("phase2", {}).get("module", name)
        return convert_notebook(nb, f"notebooks/{name}.ipynb"), resources


def build(root: Path) -> dict[Path, str | None]:
    """What each module's file should hold; None where a generated file has lost its notebook."""
    modules, owner = {}, {}
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        try:
            text, resources = ModuleExporter().from_filename(str(notebook))
        except (NotJSONError, ValidationError) as error:
            why = str(error).partition("\n")[0]
            raise Refused(f"notebooks/{notebook.name}: no notebook ({why})") from error
        path = root / "phase2" / f"{resources['unique_key']}.py"
        if text and path in modules:
            raise Refused(f"{notebook.name} and {owner[path]} both export phase2.{path.stem}")
        if text:
            modules[path], owner[path] = text, notebook.name
    if not modules:
        raise Refused(f"no notebook in {root / 'notebooks'} exports a module")
    for path in sorted((root / "phase2").rglob("*.py")):
        if path not in modules and path.stem not in HAND_WRITTEN:
            if not path.read_text(encoding="utf-8").startswith(HEADER):
                raise Refused(f"{path.relative_to(root)}, line 1: no notebook owns this module")
            modules[path] = None
    return modules


def difference(path: Path, expected: str | None) -> str | None:
    """What is wrong with a module's file; None if its bytes are those expected."""
    if expected is None:
        return f"phase2/{path.name}: stale, no notebook exports it"
    if not path.exists():
        return f"phase2/{path.name}: missing"
    found = path.read_bytes()
    if found == expected.encode():
        return None
    old, new = found.decode(errors="replace").split("\n"), expected.split("\n")
    line = next(n for n, (a, b) in enumerate(zip_longest(old, new)) if a != b)
    marks = [n for n, text in enumerate(new[: line + 1]) if text.startswith("# %% ")]
    place = f"{new[marks[-1]][5:]}, line {line - marks[-1]}" if marks else "above its first cell"
    return f"phase2/{path.name}, line {line + 1}: not what the notebook says ({place})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m phase2_book.exporter", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare bytes and write nothing")
    parser.add_argument("--root", type=Path, default=Path(), help="the repository (default: .)")
    options = parser.parse_args()
    try:
        modules = build(options.root)
    except Refused as error:
        sys.exit(f"refused: {error}")
    changes = {path: why for path, text in modules.items() if (why := difference(path, text))}
    if options.check and changes:
        advice = "nothing was written; `make package` writes phase2/ from the notebooks: what was"
        advice += " changed in phase2/ itself is lost then, if it is not in its notebook cell first"
        sys.exit("\n".join([*changes.values(), advice]))
    for path in changes:
        if modules[path] is None:
            path.unlink()
        else:
            path.write_bytes(modules[path].encode())
        print(f"{'removed' if modules[path] is None else 'wrote'} {path}")


if __name__ == "__main__":
    main()
