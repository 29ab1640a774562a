"""What an export cell may hold. Every refusal names the notebook, the cell and the line in it."""

import ast
import json
import re
import subprocess
import sys

MAX_LINES = 40
RULE = "an export cell holds only imports, CONSTANTS, functions and classes"
MAGIC = re.compile(r"\s*[%!?]|.*\?\s*$|[^=]*=\s*[%!]")
RUFF = ["--isolated", "--line-length=100", "--target-version=py311"]
RUFF += ["--config=lint.isort.known-first-party=['phase2']"]


class Refused(Exception):
    """A rule is broken; the message says which, and where."""


def refuse(where: str, line: int, why: str):
    raise Refused(f"{where}, line {line}: {why}")


def ruff(command: str, text: str) -> str:
    """Pass `text` through ruff, with settings that do not depend on where it runs."""
    line = [sys.executable, "-m", "ruff", *command.split(), *RUFF, "-"]
    run = subprocess.run(line, input=text, capture_output=True, encoding="utf-8")
    if run.returncode > 1:
        raise RuntimeError(run.stderr)
    return run.stdout


def parse(source: str, where: str) -> list[ast.stmt]:
    """The statements of a cell, once it is known to be short and valid Python."""
    lines = source.split("\n")
    if len(lines) > MAX_LINES:
        refuse(where, MAX_LINES + 1, f"the cell has {len(lines)} lines; {MAX_LINES} are allowed")
    try:
        compile(source, where, "exec", dont_inherit=True)
    except SyntaxError as error:
        line = min(error.lineno or 1, len(lines))
        magic = MAGIC.match(lines[line - 1])
        refuse(where, line, f"magic; {RULE}" if magic else f"syntax error: {error.msg}")
    return ast.parse(source).body


def imports(node: ast.Import | ast.ImportFrom, module: str, where: str) -> dict[str, str]:
    """For each name that `node` binds, the import statement of that name alone."""
    single = {}
    for alias in node.names:
        source = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        if getattr(node, "level", 0) or alias.name == "*":
            refuse(where, node.lineno, "relative or star import; name the module and what is used")
        if f"{source}{alias.name}.".startswith(f"phase2.{module}."):
            refuse(where, node.lineno, f"phase2.{module} imports itself")
        only = type(node)(**{**vars(node), "names": [alias]})
        single[alias.asname or alias.name] = ast.unparse(only)
    return single


def definitions(node: ast.stmt, where: str) -> dict[str, None]:
    """The name that a statement other than an import defines; a bare string defines none."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name: None}
        case (
            ast.Assign(targets=[ast.Name(id=name)])
            | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr())
        ) if name.lstrip("_")[:1].isupper():
            return {name: None}
        case ast.Expr(value=ast.Constant(value=str())):
            return {}
    refuse(where, node.lineno, f"stray statement `{ast.unparse(node).splitlines()[0]}`; {RULE}")


def lint(cells: dict[str, str]) -> None:
    """Refuse what runs in the notebook but not in the module: a name that no export cell binds."""
    rows = [(where, n) for where in cells for n, _ in enumerate(cells[where].split("\n"), 1)]
    report = ruff("check --select=F821,E702 --output-format=json", "\n".join(cells.values()))
    for problem in json.loads(report):
        where, line = rows[problem["location"]["row"] - 1]
        refuse(where, line, problem["message"])
