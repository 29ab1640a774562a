"""The command line: what it does, what it says, how it fails."""

import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from phase2.checkpoints import from_pretrained, save_pretrained  # noqa: E402
from phase2.cli import app, train  # noqa: E402
from phase2.inference import evaluate, generate  # noqa: E402

TEXT = "".join(f"{n} squared is {n * n}; " for n in range(400))
SIZE = ["d_model=16", "n_layers=1", "n_heads=2", "n_seq=24"]
TINY = [word for field in SIZE for word in ("--set", field)]
QUICK = ["--steps", "12", "--evaluate-every", "6", "--learning-rate", "0.01", "--cpu"]


def phase2(*arguments, code=0, **options):
    """Run a command; returns what it wrote to stdout, or to stderr if it was to fail."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], **options)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stderr if code else result.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "my.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(text):
    out = text.parent / "run"
    said = phase2("train", "--text", text, "--out", out, *TINY, *QUICK)
    assert said.startswith("12 steps, ") and f"the model is in {out}" in said
    return out


def test_train_leaves_a_model_and_a_log(run):
    model = from_pretrained(run)
    assert model.config.d_model == 16 and model.config.n_seq == 24
    assert len((run / "history.jsonl").read_text().splitlines()) == 12


def test_train_refuses_to_overwrite_and_resumes(run, text):
    before = (run / "training.pt").read_bytes()
    again = ["train", "--text", text, "--out", run, *TINY, *QUICK]
    assert "training.pt exists" in phase2(*again, code=1)
    assert (run / "training.pt").read_bytes() == before
    assert phase2(*again, "--resume").startswith("12 steps, ")
    assert "learning_rate was" in phase2(*again, "--resume", "--learning-rate", 1, code=1)


def test_resuming_remembers_the_options(run, text):
    bare = ["train", "--text", text, "--out", run, "--resume"]
    assert phase2(*bare).startswith("12 steps, ")
    assert "learning_rate was 0.01 and is 1.0" in phase2(*bare, "--learning-rate", 1, code=1)
    assert "d_model was 16 and is 32" in phase2(*bare, "--set", "d_model=32", code=1)
    options = json.loads((run / "options.json").read_text())
    assert options["learning_rate"] == 0.01 and options["tokenizer"] == "bytes"


def test_resuming_needs_no_text_and_adds_fields(run):
    assert phase2("train", "--out", run, "--resume").startswith("12 steps, ")
    changed = phase2("train", "--out", run, "--resume", "--set", "n_layers=2", code=1)
    assert "n_layers was 1 and is 2" in changed and "d_model" not in changed


def test_options_of_a_command_that_failed_are_not_remembered(text, tmp_path):
    train = ["train", "--text", text, "--out", tmp_path, *QUICK]
    assert "must be a multiple" in phase2(*train, *TINY, "--accumulate", 3, code=1)
    assert phase2(*train, *TINY, "--resume").startswith("12 steps, ")
    (tmp_path / "options.json").write_text("{")
    assert "options.json: damaged" in phase2(*train, "--resume", code=1)


def test_training_goes_on_from_a_model(run, text, tmp_path):
    before = from_pretrained(run)
    more = ["train", "--init", run, "--text", text, "--out", tmp_path, *QUICK]
    assert "leave out --set" in phase2(*more, *TINY, code=1)
    phase2(*more, "--learning-rate", "0.001")
    after, words = from_pretrained(tmp_path), text.read_text(encoding="utf-8")
    assert after.config == before.config
    first, then = (evaluate(model, words)["bits_per_byte"] for model in (before, after))
    assert then < first
    assert phase2("train", "--out", tmp_path, "--resume").startswith("12 steps, ")


def test_version_and_module():
    said = phase2("--version")
    assert said.startswith("phase2 ") and said.strip()[-1].isdigit()
    command = [sys.executable, "-m", "phase2", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == said


def test_training_needs_text(text, tmp_path):
    assert "give at least one text file" in phase2("train", "--out", tmp_path, code=2)
    said = phase2("train", "--resume", "--out", tmp_path / "typo", code=2)
    assert "typo" in said and "training.pt of a run to resume is missing" in said
    said = phase2("train", "--text", text, "--vocab-size", 300, "--out", tmp_path, code=1)
    assert "vocab_size is for tokenizer='bpe', got 300" in said


def test_resuming_nothing_starts_and_says_so(text, tmp_path):
    options = [*TINY, *QUICK, "--resume", "--out", tmp_path / "new"]
    result = CliRunner().invoke(app, ["train", "--text", str(text), *map(str, options)])
    assert result.exit_code == 0
    assert "there is no run in" in result.stderr and "12 steps" in result.stdout


def test_what_a_run_began_with_stays(run, text, tmp_path, monkeypatch):
    bare = ["train", "--out", run, "--resume"]
    assert "with --tokenizer bytes: leave it out" in phase2(*bare, "--tokenizer", "bpe", code=1)
    assert "without --vocab-size: leave it out" in phase2(*bare, "--vocab-size", 300, code=1)
    assert "text, tokenizer or held_out are not those of" in phase2(
        *bare, "--held-out", 0.5, code=1
    )
    monkeypatch.chdir(tmp_path)  # the plainest way: the folder is "run", no option is given again
    phase2("train", "--text", text, *TINY, *QUICK)
    assert "the model is in run" in phase2("train", "--resume")
    (tmp_path / "run" / "options.json").write_text("[1]")
    assert "options.json: damaged" in phase2("train", "--resume", code=1)


def test_a_text_that_has_moved_is_remembered_where_it_is(tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text(TEXT)
    train = ["train", "--out", tmp_path / "run"]
    phase2(*train, "--text", first, *TINY, *QUICK)
    first.rename(second)
    assert phase2(*train, "--resume", "--text", second) == phase2(*train, "--resume")


def test_a_model_to_begin_with_is_found_from_anywhere(run, text, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent)
    out = ["--out", tmp_path / "more"]
    phase2("train", "--init", run.name, "--text", text.name, *out, *QUICK)
    monkeypatch.chdir(tmp_path)
    assert "the model is in more" in phase2("train", "--resume", "--out", "more")


def test_warnings_are_sentences(text, tmp_path):
    arguments = [*TINY, *QUICK, "--tokenizer", "bpe", "--vocab-size", 280]
    phase2("train", "--text", text, "--out", tmp_path, *arguments)
    (tmp_path / "tokenizer.json").unlink()
    command = [sys.executable, "-m", "phase2", "generate", tmp_path, "--prompt", "a"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.stderr.startswith("phase2: warning: ") and done.stderr.count("\n") == 1


def test_without_standard_input(run):
    command = f"{sys.executable} -m phase2 generate {run} <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and "give --prompt" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_with_byte_pairs(text, tmp_path):
    pairs = ["--tokenizer", "bpe", "--vocab-size", 280]
    arguments = ["train", "--text", text, "--out", tmp_path, *TINY, *QUICK, *pairs]
    phase2(*arguments)
    assert from_pretrained(tmp_path).tokenizer.vocab_size == 280
    phase2("train", "--text", text, "--out", tmp_path, "--resume")
    scores = json.loads(phase2("evaluate", tmp_path, "--text", text, "--json"))
    assert scores["bits_per_byte"] < scores["loss"]  # a token is several bytes
    assert phase2("generate", tmp_path, "--prompt", "12 squared", "--max-tokens", 5)


def test_generate_streams_what_the_package_generates(run):
    said = phase2("generate", run, "--prompt", "7 squared", "--max-tokens", 20, "--temperature", 0)
    model = from_pretrained(run)
    ids = generate(model, model.tokenizer.encode("7 squared").long()[None], 20)
    assert said == model.tokenizer.decode(ids) + "\n"
    sampled = ["generate", run, "--prompt", "7", "--max-tokens", 30, "--top-k", 20, "--top-p", 0.9]
    assert phase2(*sampled, "--seed", 1) == phase2(*sampled, "--seed", 1)
    assert phase2(*sampled, "--seed", 1) != phase2(*sampled, "--seed", 2)


def test_generate_without_a_prompt_is_a_session(run):
    said = phase2("generate", run, "--max-tokens", 5, input="7 squared\nquit\n")
    assert said and not said.startswith("> ")  # no prompt in a pipe


def test_evaluate_prints_what_the_package_measures(run, text):
    scores = json.loads(phase2("evaluate", run, "--text", text, "--json"))
    ids = torch.tensor(list(TEXT.encode()))
    assert scores == pytest.approx(evaluate(from_pretrained(run), ids))
    assert "bits per byte" in phase2("evaluate", run, "--text", text)


def test_evaluate_needs_something_to_predict(run, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    said = phase2("evaluate", run, "--text", tmp_path / "one.txt", code=1)
    assert "at least two tokens" in said


def test_diagnose_writes_a_page_and_numbers(run, text, tmp_path):
    page, numbers = tmp_path / "report.html", tmp_path / "report.json"
    options = ["--out", page, "--json", numbers, "--max-tokens", 200]
    said = phase2("diagnose", run, "--text", text, *options)
    assert str(page) in said and str(numbers) in said
    assert "<html" in page.read_text(encoding="utf-8")
    assert json.loads(numbers.read_text())["model_config"]["d_model"] == 16


@pytest.mark.parametrize(
    "command, option",
    [
        ("train", "--warmup"),
        ("generate", "--top-k"),
        ("evaluate", "--json"),
        ("diagnose", "--max-tokens"),
    ],
)
def test_help(command, option):
    assert command in phase2("--help")
    assert option in phase2(command, "--help")


def test_completion():
    assert "--install-completion" in phase2("--help")
    environment = {"_PHASE2_COMPLETE": "complete_bash", "COMP_WORDS": "phase2 ev"}
    environment["COMP_CWORD"] = "1"
    result = CliRunner().invoke(app, [], prog_name="phase2", env=environment)
    assert "evaluate" in result.output


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["train"], 2, "--text"),
        (["train", "--text", "nowhere.txt"], 2, "nowhere.txt"),
        (["train", "--text", "TEXT", "--set", "d_mdel=8"], 1, "did you mean 'd_model'?"),
        (["train", "--text", "TEXT", "--set", "d_model"], 1, "NAME=VALUE"),
        (["train", "--text", "TEXT", "--set", "d_model=wide"], 1, "d_model takes int values"),
        (["train", "--text", "TEXT", "--set", "n_seq=999999"], 1, "longer than n_seq"),
        (["train", "--text", "TEXT", "--steps", "0"], 1, "steps must be"),
        (["train", "--text", "TEXT", "--steps", "many"], 2, "--steps"),
        (["train", "--text", "EMPTY"], 1, "must hold some text"),
        (["train", "--text", "TEXT", "--set", "base_decay=1e-300"], 1, "base_decay must be"),
        (["train", "--text", "TEXT", "--seed", "9" * 20], 2, "--seed"),
        (["generate", "RUN", "--top-k", "0"], 1, "top_k must be"),
        (["generate"], 2, "checkpoint"),
        (["generate", "nowhere", "--prompt", "a"], 1, "nowhere: no such file or folder"),
        (["generate", "RUN", "--prompt", ""], 1, "--prompt must not be empty"),
        (["generate", "RUN", "--prompt", "a", "--temperature", "-1"], 1, "temperature must be"),
        (["generate", "RUN", "--prompt", "a", "--device", "nonsense"], 1, "--device nonsense"),
        (["generate", "RUN", "--prompt", "a", "--device", "meta"], 1, "--device meta"),
        (["generate", "TEXT", "--prompt", "a"], 1, "my.txt: "),
        (["train", "--text", "LATIN", "--tokenizer", "bpe"], 1, "byte pairs need UTF-8, byte 2 of"),
        (["evaluate", "RUN", "--text", "EMPTY"], 1, "must hold some text"),
        (["diagnose", "RUN", "--text", "TEXT", "--out", "no/such/folder.html"], 1, "no/such"),
        (["diagnose", "RUN", "--text", "TEXT", "--json", "no/such/folder.json"], 1, "no/such"),
        (
            ["diagnose", "RUN", "--text", "TEXT", "--out", "a", "--json", "a"],
            1,
            "another file than --out",
        ),
        (["diagnose", "RUN", "--text", "TEXT", "--out", "TEXT"], 1, "another file than --text"),
        (
            ["diagnose", "RUN", "--text", "TEXT", "--json", "CONFIG"],
            1,
            "another file than those of the checkpoint",
        ),
    ],
)
def test_failures_are_one_line_and_a_code(run, text, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty.txt"
    empty.touch()
    latin = tmp_path / "latin.txt"
    latin.write_text("na\xefve " * 100, encoding="latin-1")
    places = {"RUN": run, "TEXT": text, "EMPTY": empty, "LATIN": latin}
    places["CONFIG"] = run / "config.json"
    small = TINY + QUICK if arguments[0] == "train" and code == 1 else []
    chosen = [arguments[0], *small, *(places.get(a, a) for a in arguments[1:])]
    said = phase2(*chosen, code=code)
    assert words.lower() in said.lower()
    if code == 1:
        said = said.removeprefix("phase2: learning byte pairs\n")  # which takes a while
        assert said.startswith("phase2: error: ") and said.count("\n") == 1


def test_ctrl_c_saves(text, tmp_path):
    out = tmp_path / "run"
    endless = [*TINY, *QUICK, "--steps", "100000", "--evaluate-every", "1000"]
    command = [sys.executable, "-m", "phase2", "train", "--text", text, "--out", out, *endless]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    history = out / "history.jsonl"
    try:
        for _ in range(1200):
            if history.exists() and history.read_text().count("\n") >= 3:
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "stopped after step" in said and "saved in" in said and "Traceback" not in said
    assert f"go on with: phase2 train --resume --out {out}" in said
    steps = torch.load(out / "training.pt")["step"]
    assert len(history.read_text().splitlines()) == steps >= 3
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    again = [*command[:3], "train", "--text", text, "--out", out, "--resume", "--steps", "9"]
    said = subprocess.run(list(map(str, again)), stderr=subprocess.PIPE, text=True, timeout=60)
    assert said.returncode == 1 and "steps was 100000 and is 9" in said.stderr


def test_a_run_is_resumed_from_anywhere_and_its_folder_is_quoted(text, tmp_path, monkeypatch):
    monkeypatch.chdir(text.parent)
    folder = tmp_path / "my run"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("phase2.checkpoints.save_pretrained", stop)
        said = phase2("train", "--text", text.name, "--out", folder, *TINY, *QUICK, code=130)
    assert f"go on with: phase2 train --resume --out '{folder}'" in said
    monkeypatch.chdir(tmp_path)
    assert "the model is in my run" in phase2("train", "--resume", "--out", "my run")


def test_an_interrupt_before_anything_was_saved(text, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("phase2.training.text_data", stop)
    said = phase2("train", "--text", text, "--out", tmp_path / "new", *TINY, code=130)
    assert "interrupted, nothing was saved" in said and "--resume" not in said


def test_init_refuses_what_it_would_ignore(run, text, tmp_path):
    for option in (["--preset", "large"], ["--tokenizer", "bpe"], ["--vocab-size", "300"]):
        command = ["train", "--text", text, "--init", run, "--out", tmp_path / "new", *option]
        assert f"leave out {option[0]}" in phase2(*command, code=1)


def test_a_report_is_no_folder(run, text, tmp_path):
    said = phase2("diagnose", run, "--text", text, "--out", tmp_path, code=1)
    assert "is a folder, not a file" in said


def test_a_terminal_without_the_characters_of_a_report(run, text, tmp_path):
    command = [sys.executable, "-m", "phase2", "diagnose", run, "--text", text]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "report.html")],
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    assert done.returncode == 0 and b"window from ?" in done.stdout


def test_paths_may_be_strings_in_the_context(tmp_path):
    """As in older versions of typer; the function itself is given paths."""
    text, out = tmp_path / "my.txt", tmp_path / "run"
    text.write_text("one two three. " * 100)
    params = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    params |= {"text": [str(text)], "out": str(out), "steps": 2, "warmup": 1}
    params["set_"] = ["d_model=16", "n_layers=1", "n_heads=2", "n_seq=16"]
    given = SimpleNamespace(name="COMMANDLINE")
    context = SimpleNamespace(params=params, get_parameter_source=lambda name: given)
    train(context, text=[text], out=out)
    assert (out / "model.safetensors").exists()


def test_scores_that_are_no_numbers_are_null_in_json(run, text, tmp_path):
    model = from_pretrained(run)
    with torch.no_grad():
        model.head.weight[0] = math.nan
    save_pretrained(model, tmp_path / "broken")
    scores = json.loads(phase2("evaluate", tmp_path / "broken", "--text", text, "--json"))
    assert scores["loss"] is None and scores["tokens"] == len(TEXT.encode()) - 1
    options = ["--prompt", "a", "--temperature", 0]
    said = phase2("generate", tmp_path / "broken", *options, code=1)
    assert "logits must be finite" in said


def test_a_prompt_need_not_be_text(run):
    said = phase2("generate", run, "--prompt", "bad \udcff", "--max-tokens", 2)
    assert said.startswith("bad ")


def test_diagnose_makes_no_more_tokens_than_it_needs(run, monkeypatch):
    from phase2 import cli
    from phase2.checkpoints import from_pretrained

    model, seen = from_pretrained(run), []
    encode = model.tokenizer.encode
    monkeypatch.setattr(model.tokenizer, "encode", lambda x: seen.append(len(x)) or encode(x))
    long = run.parent / "long.txt"
    long.write_text("é" * 100_000, encoding="utf-8")
    ids = cli.read_ids(model, [long], 10)
    assert len(ids) == 10 and max(seen) <= 32 * 10 + 1


def test_counts_are_whole(run, text):
    assert " tokens " in (said := phase2("evaluate", run, "--text", text))
    assert said.split()[said.split().index("tokens") + 1].isdigit()


def test_ctrl_c_ends_the_learning_of_byte_pairs(capsys):
    from phase2.cli import learning_pairs

    before = signal.getsignal(signal.SIGINT)
    with learning_pairs():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before
    assert "learning byte pairs" in capsys.readouterr().err
