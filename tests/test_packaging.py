"""What is installed: a wheel of phase2 alone that needs torch alone, and lists that agree."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import phase2

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
OPTIONAL = {"cli", "display"}  # modules that an extra serves


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_core_depends_on_torch_alone():
    assert [Requirement(line).name for line in PROJECT["dependencies"]] == ["torch"]


@pytest.mark.parametrize("path", sorted((ROOT / "phase2").glob("*.py")), ids=lambda path: path.stem)
def test_modules_import_torch_alone(path):
    if path.stem in OPTIONAL:
        pytest.skip("an extra serves this module")
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert foreign <= {"torch", "phase2"}


def test_importing_phase2_loads_no_plotting():
    plotting = "{'matplotlib', 'IPython', 'ipywidgets'}"
    loaded = f"import sys, phase2.model; print(*{plotting} & set(sys.modules))"
    shown = subprocess.run(
        [sys.executable, "-c", loaded], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert shown.stdout.strip() == ""


def test_help_and_completion_answer_without_torch():
    code = "import sys, phase2.cli; assert 'torch' not in sys.modules; phase2.create_phase2_model"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_phase2_has_its_names_and_its_mechanisms_and_no_others():
    assert {*phase2.__all__, "memory", "stability"} <= set(dir(phase2))
    assert phase2.memory.memory_chunked and phase2.Phase2Config
    assert not hasattr(phase2, "cli.app") and not hasattr(phase2, "nothing")


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("huggingface_hub")
    from phase2.checkpoints import save_pretrained

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(readme, encoding="utf-8")
    Path("my.txt").write_text(readme[:300], encoding="utf-8")
    names = {}
    exec(first.replace("range(100)", "range(2)"), names)  # noqa: S102
    assert names["state"].position == (65,)
    save_pretrained(names["model"], "my-model")
    exec(second, {})  # noqa: S102
    assert "mean SNR" in capsys.readouterr().out


def test_wheel_holds_phase2_alone(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ["pyproject.toml", "LICENSE", "README.md"]:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ["phase2", "book", "tests"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--wheel-dir", str(tmp_path)]
    subprocess.run([*command, "--quiet", "--no-deps", "--no-build-isolation"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"phase2", f"{wheel.stem[:12]}.dist-info"}
    modules = {name for name in names if name.startswith("phase2/")}
    assert modules == {f"phase2/{path.name}" for path in (ROOT / "phase2").glob("*.py")}


def test_constraints_are_names_and_versions():
    assert CONSTRAINTS
    assert not [line for line in CONSTRAINTS if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]


def test_constraints_pin_every_extra_that_make_installs():
    pinned = {canonical(line.split("==")[0]) for line in CONSTRAINTS}
    extras = PROJECT["optional-dependencies"]
    wanted = [Requirement(line) for extra in ["book", "test", "train"] for line in extras[extra]]
    assert not {canonical(wish.name) for wish in wanted} - pinned


def test_constraints_are_within_the_ranges():
    pinned = {canonical(n): v for n, v in (line.split("==") for line in CONSTRAINTS)}
    lines = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    for wish in map(Requirement, lines):
        version = pinned.get(canonical(wish.name))
        assert version is None or wish.specifier.contains(version), wish


def test_environment_hands_over_to_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert set(environment) == {"name", "channels", "dependencies"}
    python, pip, handed = environment["dependencies"]
    assert python.startswith("python=3.") and pip == "pip"
    assert handed["pip"] == ["-c constraints.txt", "-e .[book,test,train]", "-e book"]
    named = re.search(r"\[(.+)\]", handed["pip"][1])[1].split(",")
    assert set(named) <= set(PROJECT["optional-dependencies"])
    assert (ROOT / "book" / "pyproject.toml").exists()


def test_a_module_that_needs_an_extra_is_no_attribute_without_it(monkeypatch):
    """So that `help(phase2)` and completion, which try every name, go on."""
    monkeypatch.delattr(phase2, "checkpoints", raising=False)
    monkeypatch.setitem(sys.modules, "phase2.checkpoints", None)  # cannot be imported
    assert "checkpoints" in dir(phase2) and not hasattr(phase2, "checkpoints")
