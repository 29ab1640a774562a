"""Training: exact resuming, exact sharing, and refusing what cannot work."""

import copy
import itertools
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from phase2 import training
from phase2.model import create_phase2_model
from phase2.training import (
    ENDS,
    LOWEST,
    ByteTokenizer,
    CheckpointError,
    TextWindows,
    Tokens,
    TrainSettings,
    as_tokenizer,
    batch_starts,
    bits_per_byte,
    parameter_groups,
    read_torch,
    rng_state,
    schedule,
    set_rng_state,
    split_documents,
    summary,
    text_data,
    train,
    train_bpe,
    window_starts,
    write_atomically,
)

accelerate = pytest.importorskip("accelerate")

TEXT = "".join(f"{n} squared is {n * n}; " for n in range(700))
DATA = text_data(TEXT)
TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_seq": 24, "consolidate_every": 16}
RUN = {"steps": 24, "learning_rate": 1e-2, "warmup": 4, "evaluate_every": 6, "save_every": 5}
RUN |= {"evaluate_windows": 8, "log_every": 3, "progress": False}


class Killed(Exception):
    pass


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return create_phase2_model(**{**TINY, **changes})


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for (_, a), b in pairs)


@pytest.fixture(scope="module")
def unbroken():
    model = tiny()
    return model, train(model, DATA, **RUN)


# Resuming


def draw(numbers, kill=None):
    """A callback that draws random numbers, and dies after a step."""

    def on_step(entry):
        numbers[entry["step"]] = torch.rand(()).item(), random.random()
        if entry["step"] == kill:
            raise Killed

    return on_step


@pytest.fixture(scope="module")
def drawn(unbroken):
    numbers = {}
    random.seed(1)
    assert train(tiny(), DATA, **RUN, on_step=draw(numbers)) == unbroken[1]  # it changes nothing
    return numbers


# before the first save, at one (it is still to come then), between two, in the last step
@pytest.mark.parametrize("kill", [3, 10, 13, RUN["steps"]])
def test_killed_at_any_step_and_resumed_is_the_same_run(kill, unbroken, drawn, tmp_path):
    # whatever else draws random numbers goes on as if nothing had happened
    (reference, history), again = unbroken, {}
    random.seed(1)
    with pytest.raises(Killed):
        train(tiny(), DATA, **RUN, out=tmp_path, on_step=draw(again, kill))
    saved = (tmp_path / "training.pt").exists()
    assert saved == (kill > RUN["save_every"])
    if saved:
        resumed = tiny(seed=77)
        random.seed(99)
    else:
        random.seed(1)
        resumed = tiny()
    pieced = train(resumed, DATA, **RUN, out=tmp_path, resume=True, on_step=draw(again))
    assert pieced == history
    assert again == drawn
    assert same_weights(resumed, reference)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history


def test_a_process_that_is_killed_outright_resumes_exactly(unbroken, tmp_path):
    script = f"""
        import time, torch
        torch.set_num_threads({torch.get_num_threads()})
        from phase2.model import create_phase2_model
        from phase2.training import text_data, train
        data = text_data("".join(f"{{n}} squared is {{n * n}}; " for n in range(700)))
        torch.manual_seed(0)
        train(create_phase2_model(**{TINY}), data, **{RUN}, out={str(tmp_path)!r},
              on_step=lambda entry: time.sleep(0.05))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    goal, history = 13, tmp_path / "history.jsonl"  # between two saves
    try:
        for _ in range(1200):
            if history.exists() and history.read_text().count("\n") >= goal:
                break
            assert process.poll() is None, "the process ended by itself"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert read_torch(tmp_path / "training.pt")["step"] < RUN["steps"]
    resumed = tiny(seed=3)
    assert train(resumed, DATA, **RUN, out=tmp_path, resume=True) == unbroken[1]
    assert same_weights(resumed, unbroken[0])


def test_ctrl_c_saves_after_the_step_and_resumes_exactly(unbroken, tmp_path):
    def on_step(entry):
        if entry["step"] == 8:
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever came before
    with pytest.raises(KeyboardInterrupt, match="stopped after step 9, saved in"):
        train(tiny(), DATA, **RUN, out=tmp_path, on_step=on_step)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert read_torch(tmp_path / "training.pt")["step"] == 9
    assert train(tiny(seed=1), DATA, **RUN, out=tmp_path, resume=True) == unbroken[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_request_to_terminate_saves_too_and_says_so(tmp_path, capsys, number, code):
    def on_step(entry):
        if entry["step"] == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        train(tiny(), DATA, **RUN, out=tmp_path, on_step=on_step)
    assert left.value.code == code and signal.getsignal(number) == before
    assert f"stopped after step 3, saved in {tmp_path}" in capsys.readouterr().err
    assert read_torch(tmp_path / "training.pt")["step"] == 3


def test_under_nohup_a_run_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        history = train(tiny(), DATA, **RUN, on_step=lambda _: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert history[-1]["step"] == RUN["steps"]


def test_a_closed_terminal_costs_no_work(tmp_path):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    code = f"""
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # the terminal is this program's own
from phase2 import create_phase2_model
from phase2.training import text_data, train
model = create_phase2_model(d_model=16, n_layers=1, n_heads=2, n_seq=16)
settings = dict(steps=10**6, save_every=10**6)
train(model, text_data("ab" * 5000), **settings, out={str(tmp_path)!r})
"""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    streams = {"stdin": its, "stdout": its, "stderr": its}
    child = subprocess.Popen([sys.executable, "-c", code], **streams, start_new_session=True)
    os.close(its)
    shown = b""
    while b"/1000000" not in shown:  # until there is a bar
        try:
            shown += os.read(ours, 10_000)
        except OSError:
            pytest.fail(shown.decode())
    os.close(ours)
    assert child.wait(60) == 129, shown.decode()
    assert read_torch(tmp_path / "training.pt")["step"] > 0


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_after_it_stops_at_once(first):
    passed = []

    def on_step(entry):
        for number in (first, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # so that they are noted in this order
            passed.append(number)

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), DATA, **RUN, on_step=on_step)
    assert passed == [first]


def test_the_bar_says_how_it_goes_where_one_is_asked_for(capsys):
    train(tiny(), DATA, **RUN | {"steps": 6})
    assert not capsys.readouterr().err
    train(tiny(), DATA, **RUN | {"steps": 6, "progress": True})
    shown = capsys.readouterr().err
    assert "6/6" in shown and "bits/byte" in shown and "held out" in shown


def test_a_batch_is_read_in_pieces():
    rows, model = [], tiny()
    model.embedding.register_forward_hook(lambda _, ids, __: rows.append(len(ids[0])))
    run = RUN | {"steps": 1, "batch_size": 12, "accumulate": 3, "evaluate_windows": 6}
    train(model, DATA, **run)
    assert rows == [4, 4, 4, 4, 2]  # of the batch, and of what is held out


def test_a_model_that_is_never_evaluated_is_ready_for_use_too():
    model = tiny()
    train(model, text_data(TEXT, held_out=0), **RUN | {"steps": 4})
    assert not model.training


def test_a_held_out_text_shorter_than_a_window_is_evaluated():
    data = DATA._replace(held_out=Tokens(DATA.held_out.ids[:7], 7))
    assert train(tiny(), data, **RUN | {"steps": 6})[-1]["held_out"] > 0


def test_a_gpu_is_repeatable_while_training_and_as_it_was_after_it(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which it would leave behind
    for before in (False, True):
        torch.use_deterministic_algorithms(before, warn_only=before)
        with training.repeatable(torch.device("cuda")):
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled() == before
        assert torch.is_deterministic_algorithms_warn_only_enabled() == before
    torch.use_deterministic_algorithms(False)


def test_random_numbers_of_numpy_are_restored_too():
    state, drawn = rng_state(), (np.random.rand(), random.random(), torch.rand(()).item())
    set_rng_state(state)
    assert (np.random.rand(), random.random(), torch.rand(()).item()) == drawn


def test_a_run_may_go_on_in_other_pieces(unbroken, tmp_path):
    def on_step(entry):
        if entry["step"] == 7:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny(), DATA, **RUN, out=tmp_path, on_step=on_step)
    history = train(tiny(), DATA, **RUN, accumulate=2, out=tmp_path, resume=True)
    for one, other in zip(unbroken[1], history, strict=True):
        assert math.isclose(one["loss"], other["loss"], rel_tol=1e-3)


def test_a_finished_run_resumes_to_itself(unbroken, tmp_path):
    train(tiny(), DATA, **RUN, out=tmp_path)
    resumed = tiny(seed=9)
    assert train(resumed, DATA, **RUN, out=tmp_path, resume=True) == unbroken[1]
    assert same_weights(resumed, unbroken[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(tiny(), DATA, **RUN, out=folder)
    return folder


@pytest.mark.parametrize("resume", [False, True])
def test_a_model_without_its_run_is_not_overwritten(tmp_path, resume):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(FileExistsError, match="model.safetensors exists, without its run"):
        train(tiny(), DATA, **RUN, out=tmp_path, resume=resume)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_is_not_overwritten(finished):
    before = (finished / "training.pt").read_bytes()
    with pytest.raises(FileExistsError, match="training.pt exists"):
        train(tiny(), DATA, **RUN, out=finished)
    assert (finished / "training.pt").read_bytes() == before


@pytest.mark.parametrize(
    "model, data, changes, message",
    [
        (TINY | {"d_model": 32}, DATA, {}, "config changed: d_model was 16 and is 32"),
        (TINY, DATA, {"learning_rate": 1.0}, "settings changed: learning_rate was 0.01 and is 1"),
        (TINY, text_data(TEXT + "."), {}, "text, tokenizer or held_out are not those"),
    ],
)
def test_another_run_is_not_resumed(finished, model, data, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        train(create_phase2_model(**model), data, **RUN | changes, out=finished, resume=True)
    assert str(finished / "training.pt") in str(error.value)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: raw[: len(raw) // 2], "cut short"),
        (lambda raw: raw[:-1], "cut short"),
        (lambda raw: b"", "cut short"),
        (lambda raw: raw[:9000] + bytes([raw[9000] ^ 1]) + raw[9001:], "checksum|cut short"),
    ],
)
def test_a_damaged_run_is_refused(finished, tmp_path, damage, message):
    raw = (finished / "training.pt").read_bytes()
    (tmp_path / "training.pt").write_bytes(damage(raw))
    (tmp_path / "history.jsonl").write_bytes((finished / "history.jsonl").read_bytes())
    with pytest.raises(CheckpointError, match=message) as error:
        train(tiny(), DATA, **RUN, out=tmp_path, resume=True)
    assert str(tmp_path / "training.pt") in str(error.value)


def test_a_log_that_is_too_short_or_damaged_is_refused(finished, tmp_path):
    (tmp_path / "training.pt").write_bytes((finished / "training.pt").read_bytes())
    with pytest.raises(CheckpointError, match="history.jsonl: has 0 lines"):
        train(tiny(), DATA, **RUN, out=tmp_path, resume=True)
    (tmp_path / "history.jsonl").write_text("{\n" * 24)
    with pytest.raises(CheckpointError, match="history.jsonl: damaged"):
        train(tiny(), DATA, **RUN, out=tmp_path, resume=True)


def test_a_log_is_on_the_disk_before_the_checkpoint_that_counts_it(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def note(name, call, *args):
        calls.append(name)
        return call(*args)

    def on_step(entry):
        calls.clear()

    monkeypatch.setattr(os, "fsync", lambda *args: note("fsync", fsync, *args))
    monkeypatch.setattr(os, "replace", lambda *args: note("replace", replace, *args))
    train(tiny(), DATA, **RUN | {"steps": 6}, out=tmp_path, on_step=on_step)
    assert calls == ["fsync", "fsync", "replace"]  # the log; the checkpoint, which then is one


def test_a_log_cut_short_before_anything_was_saved_begins_anew(unbroken, tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"st')
    assert train(tiny(), DATA, **RUN, out=tmp_path, resume=True) == unbroken[1]
    other = tmp_path / "other"
    other.mkdir()
    (other / "history.jsonl").write_text("a diary\nof mine\n")
    with pytest.raises(CheckpointError, match="history.jsonl: damaged"):
        train(tiny(), DATA, **RUN, out=other, resume=True)


@pytest.mark.parametrize("victim", ["torch.save", "os.fsync", "os.replace"])
def test_a_save_that_fails_leaves_the_old_file(finished, tmp_path, monkeypatch, victim):
    for name in ("training.pt", "history.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    before = (tmp_path / "training.pt").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(victim, full)
    with pytest.raises(OSError, match="No space left"):
        training.write_atomically(tmp_path / "training.pt", lambda file: torch.save({}, file))
    assert (tmp_path / "training.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["history.jsonl", "training.pt"]


def test_a_training_checkpoint_reads_as_a_plain_one(finished):
    checkpoint = torch.load(finished / "training.pt")  # weights_only is the default
    assert {"model_state_dict", "config", "train_loss"} < checkpoint.keys()
    create_phase2_model(**checkpoint["config"]).load_state_dict(checkpoint["model_state_dict"])


# One step


def test_accumulating_a_batch_changes_rounding_alone():
    histories = []
    for accumulate in (1, 4):
        histories.append(train(tiny(), DATA, **RUN | {"steps": 8}, accumulate=accumulate))
    for history in histories[1:]:
        for whole, pieced in zip(histories[0], history, strict=True):
            assert math.isclose(whole["loss"], pieced["loss"], rel_tol=1e-3)
            assert math.isclose(whole["gradient_norm"], pieced["gradient_norm"], rel_tol=2e-2)
        assert math.isclose(
            histories[0][0]["gradient_norm"], history[0]["gradient_norm"], rel_tol=1e-5
        )


def test_every_parameter_is_in_one_group_and_only_mixing_matrices_decay():
    model = tiny()
    decayed, free = parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3 and free["weight_decay"] == 0
    ids = [id(p) for group in (decayed, free) for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = {names[id(p)].removesuffix(".weight").split(".")[-1] for p in decayed["params"]}
    assert kinds == {"qkv", "out", "up", "down", "head"}
    model.head.weight.requires_grad_(False)
    assert len(parameter_groups(model, 0.3)[0]["params"]) == len(decayed["params"]) - 1


@given(steps=st.integers(1, 300), warmup=st.integers(0, 400))
@example(steps=1, warmup=0)
@example(steps=10, warmup=10)
def test_the_schedule_rises_and_falls_within_its_limits(steps, warmup):
    choice = TrainSettings(steps=steps, warmup=warmup, learning_rate=2.0)
    rates = [schedule(step, choice) for step in range(steps)]
    assert all(0 < rate <= 2 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < steps:
        assert max(rates) == pytest.approx(2) and rates[-1] >= 2 * LOWEST


def test_the_schedule_is_a_line_and_then_half_a_cosine():
    choice = TrainSettings(steps=100, warmup=20, learning_rate=2.0)
    assert schedule(4, choice) == pytest.approx(2 / 4)
    after_a_quarter = (1 + math.sqrt(1 / 2)) / 2
    assert schedule(40, choice) == pytest.approx(2 * (LOWEST + (1 - LOWEST) * after_a_quarter))


def test_the_gradient_is_clipped_to_the_norm_asked_for():
    accelerator = accelerate.Accelerator(cpu=True)
    run = training.prepare(tiny(), DATA, TrainSettings(clip=1e-3), accelerator)
    assert training.train_step(run)["gradient_norm"] > 1e-2  # before it is clipped
    norms = torch.stack([weight.grad.norm() for weight in run.model.parameters()])
    assert norms.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = tiny()
    with torch.no_grad():
        model.head.weight[0, 0] = math.inf
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="step 1.*learning_rate"):
        train(model, DATA, **RUN)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_step_whose_loss_is_not_finite_is_named():
    model = tiny()

    def on_step(entry):
        if entry["step"] == 2:
            model.head.weight.data[0, 0] = math.inf

    with pytest.raises(FloatingPointError, match="^step 3: the loss is"):
        train(model, DATA, **RUN, on_step=on_step)


# Is it learning?


def test_it_learns_and_logs(unbroken):
    _, history = unbroken
    assert [entry["step"] for entry in history] == list(range(1, 25))
    assert history[-1]["bits_per_byte"] < history[0]["bits_per_byte"] - 2
    assert [e["step"] for e in history if "held_out" in e] == [6, 12, 18, 24]
    looks = [entry for entry in history if "gamma" in entry]
    assert [entry["step"] for entry in looks] == list(range(1, 25, 3))
    for name in ("gamma", "snr", "resonant_share", "energy", "stable_ratio"):
        assert all(len(entry[name]) == 2 for entry in looks), name
    assert all(e["bits_per_byte"] == pytest.approx(bits_per_byte(e["loss"])) for e in history)


def test_the_log_says_what_the_diagnostics_say():
    _, seen = tiny()(DATA.train.ids[None, :100].long(), return_diagnostics=True)
    logged = training.log_of(seen)
    assert logged.pop("gamma") == [gamma.mean().item() for gamma in seen["gamma_values"]]
    assert logged == {
        "snr": [layer["mean_snr"] for layer in seen["snr_stats"]],
        "resonant_share": [layer["resonant_share"] for layer in seen["resonance_info"]],
        "energy": [layer["energy"] for layer in seen["stability_metrics"]],
        "stable_ratio": [layer["stable_ratio"] for layer in seen["stability_metrics"]],
    }


def test_evaluation_reads_windows_spread_over_the_held_out_text():
    ids = DATA.held_out.ids[: 10 * TINY["n_seq"] + 1]  # ten windows
    data, model = DATA._replace(held_out=training.Tokens(ids, len(ids))), tiny()
    choice, accelerator = TrainSettings(evaluate_windows=4), accelerate.Accelerator(cpu=True)
    found = training.held_out_bits(training.prepare(model, data, choice, accelerator))
    windows = TextWindows(ids, TINY["n_seq"])
    inputs, targets = map(torch.stack, zip(*(windows[index] for index in (0, 3, 6, 9))))
    loss = torch.nn.functional.cross_entropy(model(inputs).transpose(1, 2), targets)
    assert found == pytest.approx(bits_per_byte(loss.item()), rel=1e-5)


def test_the_model_ends_with_the_weights_that_did_best_and_patience_ends_the_run():
    data = text_data([TEXT[:600], "".join(chr(97 + i * i % 26) for i in range(300))], held_out=0.3)
    model, choice = tiny(), RUN | {"steps": 400, "patience": 3, "learning_rate": 3e-2}
    history = train(model, data, **choice)
    scores = {entry["step"]: entry["held_out"] for entry in history if "held_out" in entry}
    best = min(scores, key=scores.get)
    assert len(history) == best + 3 * 6 < 400
    accelerator = accelerate.Accelerator()
    run = training.prepare(model, data, TrainSettings(evaluate_windows=8), accelerator)
    assert training.held_out_bits(run) == pytest.approx(scores[best], abs=1e-5)
    assert not model.training


def test_a_run_that_patience_ends_is_saved(tmp_path):
    data = text_data([TEXT[:600], "".join(chr(97 + i * i % 26) for i in range(300))], held_out=0.3)
    choice = RUN | {"steps": 400, "patience": 3, "learning_rate": 3e-2, "save_every": 400}
    model = tiny()
    history = train(model, data, **choice, out=tmp_path)
    state = training.read_torch(tmp_path / "training.pt")
    assert state["step"] == len(history) < 400
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, state["best"]["weights"][name])
    assert train(tiny(), data, **choice, out=tmp_path, resume=True) == history


def test_when_to_save_and_to_lose_patience_may_change(finished, unbroken):
    changes = {"save_every": 1, "patience": 500}
    assert train(tiny(), DATA, **RUN | changes, out=finished, resume=True) == unbroken[1]


def test_a_model_keeps_the_tokenizer_of_its_data():
    data = text_data(TEXT, "bpe", vocab_size=300)
    model = create_phase2_model(**TINY | {"vocab_size": 300})
    train(model, data, **RUN | {"steps": 1})
    assert model.tokenizer is data.tokenizer


class Letters:
    """A tokenizer of one's own."""

    vocab_size, end = 128, 0

    def encode(self, text):
        text = text if isinstance(text, str) else text.decode()
        return torch.tensor([ord(letter) for letter in text])

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def test_a_tokenizer_of_one_s_own(tmp_path):
    data = text_data(TEXT, Letters())
    with pytest.warns(UserWarning, match="a Letters is not saved"):
        train(tiny(), data, **RUN | {"steps": 1}, out=tmp_path)
    with pytest.raises(TypeError, match="tokenizer must have encode, .* object lacks encode"):
        text_data(TEXT, object())


def test_a_tokenizer_of_the_library_is_wrapped():
    pairs = text_data(TEXT, "bpe", vocab_size=300).tokenizer
    again = text_data(TEXT, pairs.tokenizer)
    assert isinstance(again.tokenizer, type(pairs))
    library = pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="must have a token that ends a document"):
        text_data(TEXT, library.Tokenizer(library.models.BPE()))


def test_nothing_held_out_is_allowed():
    history = train(tiny(), text_data(TEXT, held_out=0), **RUN)
    assert not any("held_out" in entry for entry in history)


# Data


@given(text=st.text(max_size=200))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def pairs():
    pytest.importorskip("tokenizers")
    return train_bpe([TEXT], 300)


@settings(max_examples=50)
@given(text=st.text(max_size=200))
@example(text=f"a {ENDS[0]} b")
@example(text="  two  spaces\r\n\ttab\x00")
def test_byte_pairs_round_trip(pairs, text):
    ids = pairs.encode(text)
    assert pairs.decode(ids) == text
    assert pairs.end not in ids.tolist()


@pytest.mark.parametrize("end", ENDS)
def test_tokenizers_of_others_end_their_documents_in_their_own_way(end):
    library = pytest.importorskip("tokenizers")
    tokenizer = library.Tokenizer.from_str(train_bpe([TEXT], 300).tokenizer.to_str())
    foreign = library.Tokenizer.from_str(tokenizer.to_str().replace(ENDS[0], end))
    for wrapped in (foreign, SimpleNamespace(backend_tokenizer=foreign)):  # as `transformers` does
        found = as_tokenizer(wrapped)
        assert found.end == foreign.token_to_id(end)
        assert found.decode(found.encode("two  words")) == "two  words"
    none = library.Tokenizer.from_str(tokenizer.to_str().replace(ENDS[0], "<pad>"))
    with pytest.raises(ValueError, match="a token that ends a document"):
        as_tokenizer(none)


def test_ids_beyond_the_vocabulary_are_refused_before_the_first_step():
    class Odd(ByteTokenizer):
        def encode(self, text):
            return super().encode(text).int() + self.shift

    for Odd.shift in (200, -100):
        with pytest.raises(ValueError, match="ids of the text must be from 0 to below vocab_size"):
            train(tiny(), text_data(TEXT, tokenizer=Odd()), **RUN)


def test_byte_pairs_shorten_the_text_and_count_its_bytes():
    data = text_data([TEXT, "naïve " * 50], tokenizer="bpe", vocab_size=300)
    assert data.tokenizer.vocab_size == 300
    assert data.train.bytes_per_token > 1.5
    total = data.train.size + data.held_out.size
    assert total == len(TEXT.encode()) + len(("naïve " * 50).encode()) + 1
    ends = torch.cat((data.train.ids, data.held_out.ids)) == data.tokenizer.end
    assert ends.sum() == 1
    model = create_phase2_model(**TINY, vocab_size=300)
    history = train(model, data, **RUN)
    bits = bits_per_byte(history[0]["loss"], data.train.bytes_per_token)
    assert history[0]["bits_per_byte"] == pytest.approx(bits)


@given(
    documents=st.lists(st.text(min_size=1, max_size=30).map(str.encode), min_size=1, max_size=5),
    held_out=st.floats(0, 0.99),
)
def test_a_split_loses_nothing_and_cuts_between_characters(documents, held_out):
    first, second = split_documents(documents, held_out)
    assert b"".join(first + second) == b"".join(documents)
    for document in first + second:
        document.decode()
    goal = (1 - held_out) * len(b"".join(documents))
    assert -1 <= len(b"".join(first)) - goal <= 4


def test_files_and_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes("Γ is ".encode() + b"\xff")  # bytes need not be UTF-8
    data = text_data([tmp_path / "a.txt", "text"], held_out=0)
    assert bytes(data.train.ids.tolist()) == "Γ is ".encode() + b"\xff\x00text"
    with pytest.raises(ValueError, match="give a Path"):
        text_data("a.txt")
    with pytest.raises(ValueError):
        text_data(tmp_path / "a.txt", tokenizer="bpe", held_out=0)
    with pytest.raises(FileNotFoundError):
        text_data(tmp_path / "b.txt")


@given(length=st.integers(2, 400), n_seq=st.integers(1, 60), seed=st.integers(0, 2**31))
def test_a_pass_reads_every_window_once(length, n_seq, seed):
    assume(length > n_seq)
    starts = window_starts(length, n_seq, seed, 0).sort().values
    assert starts[0] >= 0 and starts[-1] + n_seq + 1 <= length
    assert (starts.diff() == n_seq).all()
    assert starts[0] < 2 * n_seq and length - starts[-1] - n_seq < 2 * n_seq + 1


def test_batches_follow_the_passes():
    starts = torch.cat([batch_starts(1000, 30, 7, 5, step) for step in range(20)])
    count = 1000 // 30 - 1
    assert torch.equal(starts[:count], window_starts(1000, 30, 5, 0))
    assert torch.equal(starts[count : 2 * count], window_starts(1000, 30, 5, 1))
    assert not torch.equal(starts[:count], window_starts(1000, 30, 6, 0))


def test_windows_feed_a_data_loader():
    windows = TextWindows(DATA.train.ids, 24)
    inputs, targets = next(iter(DataLoader(windows, batch_size=4, shuffle=True)))
    assert inputs.shape == targets.shape == (4, 24)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    with pytest.raises(IndexError):
        windows[len(windows)]


# Refusals


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: TrainSettings(steps=0), "steps must be an integer of at least 1, got 0"),
        (lambda: TrainSettings(learning_rate=0), "learning_rate must be a number above 0, got 0"),
        (lambda: train(tiny(), DATA, stps=3), "'stps', did you mean 'steps'"),
        (lambda: train(tiny(), DATA, TrainSettings(), steps=3), "not both"),
        (lambda: train(tiny(), DATA, batch_size=9, accumulate=2), "multiple of accumulate"),
        (lambda: train(tiny(n_seq=10**6), DATA), "longer than n_seq = 1000000"),
        (lambda: train(tiny(vocab_size=10), DATA), "vocab_size must be at least .* 256; got 10"),
        (lambda: text_data(TEXT, held_out=1), "held_out must be from 0 to below 1, got 1"),
        (lambda: text_data(TEXT, tokenizer="words"), "'bytes', 'bpe' or a tokenizer"),
        (lambda: text_data([]), "some text"),
        (
            lambda: train_bpe([TEXT], 200),
            "vocab_size must be an integer from 258 to 1000000, got 200",
        ),
    ],
)
def test_what_cannot_work_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_missing_package_says_how_to_get_it():
    with pytest.raises(ImportError, match=r'no_such_package .*pip install "phase2\[train\]"'):
        training.need("no_such_package.part")


# What an adversary tried


def test_a_resumed_run_leaves_no_model_of_before(tmp_path, monkeypatch):
    """Finished by patience, saved, resumed with more of it, and killed: what loads is the run."""
    checkpoints = pytest.importorskip("phase2.checkpoints")
    short, worse = RUN | {"steps": 20, "evaluate_every": 2}, itertools.count(100.0)
    model = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(training, "held_out_bits", lambda run: next(worse))
        history = train(model, DATA, **short, patience=1, out=tmp_path)
    assert len(history) == 4
    checkpoints.save_pretrained(model, tmp_path)

    def kill(entry):
        if entry["step"] == 19:
            raise Killed

    with pytest.raises(Killed):
        train(tiny(), DATA, **short, patience=100, out=tmp_path, resume=True, on_step=kill)
    best = read_torch(tmp_path / "training.pt")["best"]["weights"]
    found = checkpoints.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, found[name]) for name, weight in best.items())


@pytest.mark.parametrize("name", ["history.jsonl", "tokenizer.json", "config.json"])
def test_a_folder_with_files_of_others_is_left_alone(name, tmp_path):
    (tmp_path / name).write_text("precious")
    for resume in (False, True):
        with pytest.raises((FileExistsError, CheckpointError), match=f"{name}(: damaged| exists)"):
            train(tiny(), DATA, **RUN, out=tmp_path, resume=resume)
    assert (tmp_path / name).read_text() == "precious"


def test_a_run_that_has_saved_nothing(tmp_path):
    def stop(entry):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        train(tiny(), DATA, **RUN, out=tmp_path, on_step=stop)
    with pytest.raises(FileExistsError, match="saved nothing yet: remove it, or choose another"):
        train(tiny(), DATA, **RUN, out=tmp_path)  # it may be under way
    assert len(train(tiny(), DATA, **RUN, out=tmp_path, resume=True)) == RUN["steps"]


def test_a_log_that_two_runs_have_written_is_damaged(tmp_path):
    train(tiny(), DATA, **RUN, out=tmp_path)
    path = tmp_path / "history.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], *lines]) + "\n")
    with pytest.raises(CheckpointError, match="damaged, line 4 is not of step 4"):
        train(tiny(), DATA, **RUN, out=tmp_path, resume=True)


def test_a_signal_in_the_last_step_is_heard(tmp_path):
    def end(entry):
        if entry["step"] == RUN["steps"]:
            os.kill(os.getpid(), signal.SIGINT)

    model = tiny()
    with pytest.raises(KeyboardInterrupt, match="the last one, saved in"):
        train(model, DATA, **RUN, out=tmp_path, on_step=end)
    assert not model.training
    assert read_torch(tmp_path / "training.pt")["step"] == RUN["steps"]


def test_another_precision_is_another_run(tmp_path):
    def kill(entry):
        if entry["step"] == 12:
            raise Killed

    model, state = tiny(), accelerate.state.AcceleratorState
    state._reset_state(True)  # one precision a process, as long as nobody asks for this
    try:
        half = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        with pytest.raises(Killed):
            train(model, DATA, **RUN, out=tmp_path, on_step=kill, accelerator=half)
    finally:
        state._reset_state(True)
    ids = DATA.train.ids[None, :20].long()
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(ids), plain(ids))  # not in half precision any more
    pickle.loads(pickle.dumps(model))
    with pytest.raises(CheckpointError, match="but precision was 'bf16' and is 'no'"):
        train(tiny(), DATA, **RUN, out=tmp_path, resume=True)


def test_a_compiled_model_is_saved_like_any_other(tmp_path):
    checkpoints = pytest.importorskip("phase2.checkpoints")
    model = tiny()
    train(torch.compile(model, backend="eager"), DATA, **RUN | {"steps": 2}, out=tmp_path)
    assert same_weights(checkpoints.from_pretrained(tmp_path), model)


def test_a_model_that_gets_another_tokenizer_says_so():
    pairs = text_data(TEXT, "bpe", vocab_size=300)
    model = tiny(vocab_size=300)
    with warnings.catch_warnings(action="error"):
        train(model, pairs, **RUN | {"steps": 4})
        train(model, pairs, **RUN | {"steps": 4})  # the same
        train(model, text_data(TEXT, "bpe", vocab_size=300), **RUN | {"steps": 4})  # an equal one
    with pytest.warns(UserWarning, match="another tokenizer than the text"):
        train(model, DATA, **RUN | {"steps": 4})


def test_a_tokenizer_that_cuts_or_pads_reads_all_of_a_text():
    pytest.importorskip("tokenizers")
    ours = train_bpe([TEXT], 300)
    theirs = ours.tokenizer
    theirs.enable_truncation(16), theirs.enable_padding(length=50)
    data = text_data(TEXT, theirs, held_out=0)
    assert data.tokenizer.decode(data.train.ids) == TEXT
    assert theirs.truncation and theirs.padding  # theirs is as it was


def test_what_is_no_text_or_no_data_is_refused():
    for wrong in (lambda: ByteTokenizer().encode(3), lambda: train(tiny(), TEXT, **RUN)):
        with pytest.raises(TypeError, match="must be"):
            wrong()
    with pytest.raises(TypeError, match="settings must be a TrainSettings, got dict"):
        train(tiny(), DATA, {"steps": 2})
    assert text_data(TEXT.encode()).train.ids.equal(DATA.train.ids)
    assert ByteTokenizer().decode([-100, 65, 300]) == "\ufffdA\ufffd"


def test_a_pickled_tokenizer_is_the_same():
    """It would have forgotten that the name of a token in a text is only letters."""
    tokenizer = text_data(TEXT, "bpe", vocab_size=300).tokenizer
    ids = tokenizer.encode("a<|end|>b")
    assert tokenizer.end not in ids
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert torch.equal(other.encode("a<|end|>b"), ids)


def test_the_ready_made_classes_of_the_library():
    library = pytest.importorskip("tokenizers")
    made = library.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT], vocab_size=300, special_tokens=["</s>"], show_progress=False)
    tokenizer = text_data(TEXT, made).tokenizer
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_another_cut_of_the_same_text_is_another_text(tmp_path):
    one, other = (text_data(TEXT, held_out=share) for share in (0.1, 0.9))
    train(tiny(), one, **RUN, out=tmp_path)
    with pytest.raises(
        CheckpointError, match="text, tokenizer or held_out are not those of this run"
    ):
        train(tiny(), other, **RUN, out=tmp_path, resume=True)


def test_a_process_without_a_window_to_evaluate():
    choice = TrainSettings(evaluate_windows=1, batch_size=2)
    run = training.prepare(tiny(), DATA, choice, accelerate.Accelerator(cpu=True))
    alone = training.held_out_bits(run)
    shares = []
    for number in (0, 1):
        run.accelerator = SimpleNamespace(
            process_index=number,
            num_processes=2,
            device=torch.device("cpu"),
            reduce=lambda total, _: total,
            unwrap_model=lambda model, **_: model,
        )
        shares.append(training.held_out_bits(run))
    assert shares == [alone, 0.0]


def test_an_accelerator_that_accumulates_is_refused():
    with pytest.raises(ValueError, match="must not accumulate, got gradient_accumulation_steps"):
        train(
            tiny(),
            DATA,
            **RUN,
            accelerator=accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4),
        )


def test_a_model_whose_run_is_refused_is_as_it_was(tmp_path):
    (tmp_path / "config.json").write_text("precious")
    model, state = tiny(), accelerate.state.AcceleratorState
    model.tokenizer = before = ByteTokenizer()
    state._reset_state(True)  # one precision a process, as long as nobody asks for this
    try:
        half = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        with pytest.raises(FileExistsError):
            train(model, DATA, **RUN, out=tmp_path, accelerator=half)
    finally:
        state._reset_state(True)
    assert "forward" not in vars(model) and model.tokenizer is before


def test_a_warm_up_longer_than_the_run_is_said():
    with pytest.warns(UserWarning, match="warmup, 50, is longer than the run, 1 steps"):
        train(tiny(), DATA, steps=1, progress=False)


def test_texts_that_are_none_and_sizes_without_byte_pairs():
    for texts in (None, torch.zeros(3), [1]):
        with pytest.raises(TypeError, match="texts must be str, bytes, Path or several, got"):
            text_data(texts)
    whole = text_data([TEXT, TEXT])
    assert torch.equal(text_data(text for text in [TEXT, TEXT]).train.ids, whole.train.ids)
    with pytest.raises(ValueError, match="vocab_size is for tokenizer='bpe', got 512"):
        text_data(TEXT, vocab_size=512)
    with pytest.raises(ValueError, match="vocab_size must be an integer from 258"):
        text_data(TEXT, "bpe", vocab_size=0)


def test_windows_are_counted_from_either_end():
    windows = TextWindows(torch.arange(21), 5)
    for one, last in zip(windows[3], windows[-1], strict=True):
        assert torch.equal(one, last)
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"window {index} of 4"):
            windows[index]
    with pytest.raises(ValueError, match="n_seq must be an integer of at least 1, got 0"):
        TextWindows(torch.arange(21), 0)


def test_a_model_that_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="must not be of float16"):
        train(tiny().half(), DATA, **RUN)
    with pytest.raises(TypeError, match="compiled or not, got DataParallel"):
        train(torch.nn.DataParallel(tiny()), DATA, **RUN)
    with pytest.raises(ValueError, match="all of them are frozen"):
        train(tiny().requires_grad_(False), DATA, **RUN)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_torch_hides_of_a_failed_save_is_said(tmp_path, error):
    path = tmp_path / "training.pt"
    path.write_bytes(b"old")

    class Full:
        writes = 0

        def write(self, raw):
            Full.writes += 1
            if Full.writes > 1:  # from here on torch.save has an error of its own
                raise error
            return len(raw)

        def flush(self):
            pass

    with pytest.raises(type(error)) as raised:
        write_atomically(path, lambda _: torch.save({"x": torch.zeros(9)}, Full()))
    if isinstance(error, OSError):
        assert raised.value.filename == str(path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_an_open_file_is_no_list_of_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    with open(path) as file, pytest.raises(TypeError, match="got a file: give its Path"):
        text_data(file)


def test_a_device_without_float64_is_refused():
    accelerator = SimpleNamespace(device=torch.device("mps"), num_processes=1)
    with pytest.raises(ValueError, match="must have float64, got mps"):
        training.check_run(tiny().config, DATA, TrainSettings(), accelerator)


def test_warnings_name_the_line_that_called(tmp_path):
    with pytest.warns(UserWarning, match="does not reach its peak") as seen:
        train(tiny(), DATA, steps=1, warmup=9, progress=False)
    assert {Path(warning.filename).name for warning in seen} == {Path(__file__).name}


def test_a_bar_begins_with_what_matters_most():
    seen = {"step": 1, "loss": 2.0, "bits_per_byte": 3.0, "gamma": [0.1, 0.3], "snr": [4.0]}
    assert summary(seen) == "bits/byte 3, loss 2, Γ 0.2, SNR 4"
    seen["held_out"] = 5.0  # only in some steps
    assert summary(seen) == "held out 5, bits/byte 3, loss 2, Γ 0.2, SNR 4"


def test_numbers_of_byte_pairs_may_be_of_numpy():
    assert train_bpe(["one two three " * 20], np.int64(270)).vocab_size <= 270


def test_two_may_write_one_file(tmp_path):
    path = tmp_path / "file"

    def write(file):
        file.write(b"first")
        write_atomically(path, lambda other: other.write(b"second"))
        assert path.read_bytes() == b"second"

    write_atomically(path, write)
    assert path.read_bytes() == b"first"
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_a_run_that_diverges_before_an_evaluation_says_so():
    choice = {"steps": 3, "warmup": 1, "learning_rate": 1e38, "evaluate_every": 1}
    with pytest.raises(FloatingPointError, match=r"step 1: .*lower learning_rate"):
        train(tiny(), DATA, **choice, progress=False)


def test_a_score_that_is_no_number_is_not_the_best(monkeypatch):
    scores = iter([math.nan, 3.0, 2.0, math.nan])
    monkeypatch.setattr(training, "held_out_bits", lambda run: next(scores))
    run = training.prepare(tiny(), DATA, TrainSettings(), accelerate.Accelerator(cpu=True))
    for step in range(1, 5):
        run.step = step
        training.evaluate_run(run)
    assert (run.best["step"], run.best["bits"]) == (3, 2.0)


def test_a_default_device_is_not_that_of_texts():
    with torch.device("meta"):
        data = text_data(["one text, " * 20, "another", b""], held_out=0.2)
        starts = training.window_starts(len(data.train.ids), 8, seed=0, epoch=0)
        rows = training.read_windows(data.train.ids, starts, 8, "cpu")
        assert not (rows.is_meta or data.tokenizer.encode("").is_meta)
        assert rows.shape == (len(starts), 9)


def test_a_forward_of_the_users_own_stays():
    model, calls = tiny(), []

    def forward(*args, **options):
        calls.append(1)
        return type(model).forward(model, *args, **options)

    model.forward = forward
    train(model, DATA, steps=1, warmup=1, progress=False)
    assert model.forward is forward and calls


def test_a_mapping_or_a_class_is_no_text_and_no_tokenizer():
    with pytest.raises(TypeError, match="got dict: give its column"):
        text_data({"text": ["one", "two"]})
    with pytest.raises(TypeError, match="got the class ByteTokenizer"):
        text_data("some text", tokenizer=ByteTokenizer)


def test_a_log_that_is_no_text(tmp_path):
    (tmp_path / "history.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(CheckpointError, match="history.jsonl: damaged"):
        train(tiny(), DATA, **RUN, out=tmp_path)


def test_warnings_in_half_precision_name_the_caller():
    state = accelerate.state.AcceleratorState
    state._reset_state(True)  # one precision a process, as long as nobody asks for this
    try:
        half = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        with pytest.warns(UserWarning, match="Overdamped") as seen:
            choice = {"steps": 1, "warmup": 1, "accelerator": half, "progress": False}
            train(tiny(base_decay=5.0), DATA, **choice)
    finally:
        state._reset_state(True)
    assert {warning.filename for warning in seen} == {__file__}


def test_a_name_is_not_taken_for_a_text_without_a_word():
    with pytest.warns(UserWarning, match="'corpus.txt' is read as a text") as seen:
        text_data("corpus.txt")
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_data("A sentence, e.g. this one.")


def test_what_is_no_accelerator():
    with pytest.raises(TypeError, match="accelerator must be an accelerate.Accelerator, got str"):
        train(tiny(), DATA, **RUN, accelerator="cpu")
