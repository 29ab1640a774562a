"""The command line: phase2 train | generate | evaluate | diagnose.

Written by hand, over the functions of the package. Torch is imported by the commands, so that
``--help`` and completion answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    sys.exit('phase2: the command line needs typer: pip install "phase2[train]"')

__all__ = ["app", "main"]

BYTES_A_TOKEN = 32  # more than a token has on average
OPTIONS = "options.json"  # of a run, in its folder
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C has ended

app = typer.Typer(
    name="phase2",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Preset(StrEnum):
    small, base, large = "small", "base", "large"


class Tokenizer(StrEnum):
    bytes, bpe = "bytes", "bpe"


class Precision(StrEnum):
    no, bf16 = "no", "bf16"


def version(asked: bool) -> None:
    """Print the version and leave."""
    if asked:
        from phase2 import __version__

        typer.echo(f"phase2 {__version__}")
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train and use a language model whose memory is written by association, and forgets."""


Texts = Annotated[
    list[Path],
    typer.Option(
        "--text", metavar="FILE", help="Text file; repeatable.", exists=True, dir_okay=False
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(help="Folder of `phase2 train`, torch.save file, or OWNER/MODEL on the Hub."),
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0. [default: a GPU if any]")]


def main() -> None:
    """Run the command line; the entry point of the script ``phase2``."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that a terminal lacks is no reason
            stream.reconfigure(errors="replace")  # to lose a model's work, or a session
    warnings.showwarning = lambda message, *_: typer.echo(f"phase2: warning: {message}", err=True)
    app()


def readable(command: Callable) -> Callable:
    """A command whose expected failures are one line on stderr and exit code 1."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            fail(str(stop) or "interrupted", INTERRUPTED)
        except BrokenPipeError:
            raise  # of `| head`: typer ends without a word
        except OSError as error:
            named = f"{error.filename}: {error.strerror}" if error.filename else error
            fail(f"error: {named}")
        except (ValueError, TypeError, ImportError, ArithmeticError) as error:
            fail(f"error: {error}")
        except RuntimeError as error:
            if not any(words in str(error) for words in ("out of memory", "allocate memory")):
                raise  # a defect: its traceback is what helps
            fail("error: out of memory; when training, --accumulate or --set n_seq=... takes less")

    return run


def fail(message: str, code: int = 1) -> None:
    """Say why on stderr and leave."""
    typer.echo(f"phase2: {message}", err=True)
    raise typer.Exit(code)


def fields(pairs: list[str]) -> dict[str, Any]:
    """["d_model=64", "dt=0.5"] -> {"d_model": 64, "dt": 0.5}, typed as in Phase2Config."""
    from phase2.model import Phase2Config, check_keys

    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {pair!r}")
        check_keys([name], list(Phase2Config.__dataclass_fields__))
        kind = type(Phase2Config.__dataclass_fields__[name].default)
        try:
            values[name] = kind(value)
        except ValueError:
            message = f"--set {name} takes {kind.__name__} values, got {value!r}"
            raise ValueError(message) from None
    return values


@app.command()
@readable
def train(
    context: typer.Context,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Text file; repeatable. Not needed to --resume.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the run and the model.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    init: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Start from this model, not a new one.")
    ] = None,
    preset: Annotated[Preset, typer.Option(help="Size of a new model.")] = Preset.small,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="One field of Phase2Config; repeatable."),
    ] = None,
    tokenizer: Annotated[Tokenizer, typer.Option(help="Bytes, or byte pairs.")] = Tokenizer.bytes,
    vocab_size: Annotated[
        int | None, typer.Option(help="Number of tokens, for bpe. [default: 1024]")
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of the text to evaluate on.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Changes of the weights.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Windows a step, over all processes.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Pieces a batch is read in.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest of the run.")] = 2e-3,
    warmup: Annotated[int, typer.Option(help="Steps until it is reached.")] = 50,
    weight_decay: Annotated[float, typer.Option(help="Of mixing matrices only.")] = 0.1,
    evaluate_every: Annotated[int, typer.Option(help="Steps between two evaluations.")] = 100,
    save_every: Annotated[int, typer.Option(help="Steps between two saves.")] = 100,
    patience: Annotated[
        int, typer.Option(help="Stop after so many evaluations without a new best.")
    ] = 1000,
    seed: Annotated[
        int,
        typer.Option(
            metavar="<int>", help="Of the weights and of the order of the text.", max=2**32
        ),
    ] = 0,
    precision: Annotated[Precision | None, typer.Option(help="[default: float32]")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave GPUs alone.")] = False,
) -> None:
    """Train a model on text files. Ctrl-C saves, and so does the end of the terminal; --resume goes
    on, exactly, with the options the run was started with.

    A run that has ended cannot be made longer: start another with --init, at a lower rate.

    Several GPUs: torchrun --nproc_per_node 4 -m phase2 train --text my.txt
    """
    from phase2.training import CHECKPOINT, TrainSettings

    # parameters are read from here, by name: --resume can change where they come from;
    # in some versions of typer, paths in context.params are strings
    given = {**context.params, "text": text, "out": out}
    options = remembered(context, given) if resume else given
    if not options["text"]:
        absent = next(
            (name for name in (CHECKPOINT, OPTIONS) if not (out / name).exists()), OPTIONS
        )
        missing = f"{out / absent} of a run to resume is missing, so " if resume else ""
        raise typer.BadParameter(f"{missing}give at least one text file", param_hint="--text")
    settings = {
        name: options[name] for name in TrainSettings.__dataclass_fields__ if name in options
    }
    try:
        run_training(context, TrainSettings(**settings), options)
    except KeyboardInterrupt as stop:
        if not (out / CHECKPOINT).exists():
            raise KeyboardInterrupt("interrupted, nothing was saved") from stop
        again = f"go on with: phase2 train --resume --out {shlex.quote(str(out))}"
        raise KeyboardInterrupt(f"{str(stop) or 'interrupted'}; {again}") from stop


def remembered(context: typer.Context, given: dict[str, Any]) -> dict[str, Any]:
    """The options of `train`: those given now, then those its run was started with."""
    from phase2.training import CHECKPOINT

    path = given["out"] / OPTIONS
    if not path.exists() or not path.with_name(CHECKPOINT).exists():
        return given
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); give all options again") from error
    if not isinstance(before, dict):
        raise ValueError(f"{path}: damaged (no object of options); give all options again")
    source = context.get_parameter_source
    defaults = {name for name in given if source(name).name == "DEFAULT"}
    for name in {"tokenizer", "vocab_size", "init"} - defaults:
        if (was := before.get(name)) != given[name]:
            option = name.replace("_", "-")
            began = f"without --{option}" if was is None else f"with --{option} {was}"
            raise ValueError(f"a run goes on as it began, {began}: leave it out")
    defaults -= {"out", "resume"}
    now = {**given, **{name: before[name] for name in defaults & before.keys()}}
    now["set_"] = [*(before.get("set_") or []), *(given["set_"] or [])]
    now["text"] = [Path(name) for name in now["text"] or []]
    return now


@contextlib.contextmanager
def learning_pairs():
    """Say what takes a while, and let Ctrl-C end it at once, for no Python runs in it."""
    typer.echo("phase2: learning byte pairs", err=True)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def beginning(context: typer.Context, options: dict[str, Any]):
    """The model to train, new or that of --init, and the texts, tokenized for it."""
    import torch

    from phase2.checkpoints import from_pretrained, read_tokenizer
    from phase2.model import create_phase2_model
    from phase2.training import TOKENIZER, text_data

    texts, held_out = options["text"], options["held_out"]
    if options["init"]:
        source = context.get_parameter_source
        for name in ("set_", "preset", "tokenizer", "vocab_size"):
            if source(name).name != "DEFAULT":
                option = name.strip("_").replace("_", "-")
                raise ValueError(f"--init brings its own configuration: leave out --{option}")
        model = from_pretrained(options["init"])
        return model, text_data(texts, model.tokenizer, held_out=held_out)
    tokenizer = options["tokenizer"]
    if options["resume"] and (options["out"] / TOKENIZER).exists():
        tokenizer = read_tokenizer(options["out"])
    size = options["vocab_size"] if isinstance(tokenizer, str) else None  # else it has its own
    with learning_pairs() if tokenizer == "bpe" else contextlib.nullcontext():
        data = text_data(texts, tokenizer, size, held_out)
    values = {"vocab_size": data.tokenizer.vocab_size, **fields(options["set_"] or [])}
    torch.manual_seed(options["seed"])
    return create_phase2_model(preset=options["preset"], **values), data


def run_training(context, settings, options) -> None:
    """Train a model, save it as a folder of the Hub's form, and say how it went."""
    from phase2.checkpoints import save_pretrained
    from phase2.training import CHECKPOINT, new_accelerator, write_atomically
    from phase2.training import train as train_model

    out, resume = options["out"], options["resume"]
    model, data = beginning(context, options)
    accelerator = new_accelerator(options["cpu"], mixed_precision=options["precision"])
    if resume and accelerator.is_main_process and not (out / CHECKPOINT).exists():
        typer.echo(f"phase2: there is no run in {out} to resume; starting one", err=True)

    @functools.cache
    def keep_options():  # at the first step: by then the folder is known to be this run's
        texts = [str(path.absolute()) for path in options["text"]]  # wherever it is resumed from
        init = options["init"] and Path(options["init"])
        init = str(init.absolute()) if init and init.exists() else options["init"]
        chosen = json.dumps({**options, "text": texts, "init": init}, default=str, indent=2)
        if accelerator.is_main_process:
            write_atomically(out / OPTIONS, lambda file: file.write(chosen.encode()))

    places = {"out": out, "resume": resume, "accelerator": accelerator}
    history = train_model(model, data, settings, **places, on_step=lambda _: keep_options())
    keep_options()
    if accelerator.is_main_process:
        save_pretrained(model, out, data.tokenizer)
        best = min((entry["held_out"] for entry in history if "held_out" in entry), default=None)
        score = f"{best:.3f} bits per byte held out" if best is not None else "nothing held out"
        typer.echo(f"{len(history)} steps, {score}; the model is in {out}")
    accelerator.end_training()


def load(checkpoint: str, device: str | None):
    """The model of a checkpoint, on the device asked for or the best there is."""
    import torch

    from phase2.checkpoints import from_pretrained

    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros((), device=place).item()  # now, not after the work
    except NotImplementedError as error:  # in a thousand characters
        raise ValueError(f"--device {device}: not available here") from error
    except (AssertionError, RuntimeError) as error:  # of a device that is not there
        why = str(error).partition("\n")[0]
        raise ValueError(f"--device {device}: {why}") from error
    return from_pretrained(checkpoint).to(place)


def read_ids(model, text: list[Path], most: int | None = None):
    """The first tokens of text files as one row of ids for this model, (N,) int64."""
    from phase2.training import read_documents, split_documents, tokenize

    documents = read_documents(text)
    size = sum(map(len, documents))
    if most and size > BYTES_A_TOKEN * most:  # tokens beyond need not be made
        documents, _ = split_documents(documents, 1 - BYTES_A_TOKEN * most / size)
    return tokenize(documents, model.tokenizer).ids[:most].long()


@app.command()
@readable
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue. [default: ask, line by line]")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest continuation.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most probable tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this much probability.")] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="<int>", help="For the same text again.", max=2**32)
    ] = None,
    device: Device = None,
) -> None:
    """Continue a prompt, token by token; without one, a session that remembers what was said.

    In a session, "reset" empties the memory and "quit" ends it.
    """
    import torch

    from phase2.inference import answer, check_sampling, interact

    if prompt == "":
        raise ValueError("--prompt must not be empty; leave it out for a session")
    check_sampling(temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_tokens)
    model = load(checkpoint, device)
    place = model.embedding.weight.device
    end = model.tokenizer.end
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop_token": end}
    if seed is not None:
        options["generator"] = torch.Generator(place).manual_seed(seed)
    if prompt is None:
        if sys.stdin is None:
            raise ValueError("standard input is closed: give --prompt")
        typer.echo('phase2: "reset" empties the memory, "quit" ends', err=True)
        silent = {} if sys.stdin.isatty() else {"read": lambda _: input()}  # no "> " in a pipe
        interact(model, max_new_tokens=max_tokens, **silent, **options)
        return
    ids = model.tokenizer.encode(os.fsencode(prompt)).long()[None].to(place)
    typer.echo(os.fsencode(prompt), nl=False)
    answer(model, ids, model.tokenizer.decode, max_tokens, print, **options)


@app.command()
@readable
def evaluate(
    checkpoint: Checkpoint,
    text: Texts,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = None,
) -> None:
    """How well a model predicts text files: bits per byte and perplexity, with carried state."""
    from phase2.diagnostics import plain
    from phase2.inference import evaluate as evaluate_model

    model = load(checkpoint, device)
    scores = evaluate_model(model, read_ids(model, text))
    shown = {name: x if isinstance(x, int) else f"{x:.6g}" for name, x in scores.items()}
    lines = (f"{name.replace('_', ' '):>14} {value}" for name, value in shown.items())
    typer.echo(json.dumps(plain(scores), allow_nan=False) if as_json else "\n".join(lines))


@app.command()
@readable
def diagnose(
    checkpoint: Checkpoint,
    text: Texts,
    out: Annotated[Path, typer.Option(help="HTML page.")] = Path("report.html"),
    numbers: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file, too.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="<int>", min=2, help="Read at most so many.")
    ] = 8192,
    device: Device = None,
) -> None:
    """Look into the memories while a model reads text files, and write a report."""
    from phase2.diagnostics import diagnose as report_on
    from phase2.training import CHECKPOINT, CONFIG, HISTORY, MODEL, TOKENIZER

    for path in (out, numbers or out):
        if not path.parent.is_dir():  # now, not after the work
            raise FileNotFoundError(2, "no such folder", str(path.parent))
        if path.is_dir():
            raise IsADirectoryError(21, "is a folder, not a file", str(path))
    files = [("--out", out), *([("--json", numbers)] if numbers else [])]
    names = ("", CONFIG, MODEL, TOKENIZER, CHECKPOINT, HISTORY, OPTIONS)
    own = (Path(checkpoint) / name for name in names)
    taken = {path.resolve(): "those of the checkpoint" for path in own}
    taken |= {path.resolve(): "--text" for path in text}
    for option, path in files:
        if (other := taken.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"{option} must be another file than {other}, got {path}")
    model = load(checkpoint, device)
    report = report_on(model, read_ids(model, text, max_tokens))
    report.to_html(out)
    if numbers:
        report.to_json(numbers)
    typer.echo(str(report))
    typer.echo(f"the report is {out}" + (f", its numbers are in {numbers}" if numbers else ""))
