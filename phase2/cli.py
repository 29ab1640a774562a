"""The command line: phase2 train | generate | evaluate | diagnose.

Written by hand, over the functions of the package. Torch is imported by the commands, so that
``--help`` and completion answer at once.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
except ModuleNotFoundError:
    sys.exit('phase2: the command line needs typer: pip install "phase2[train]"')

__all__ = ["app", "main"]

OPTIONS = "options.json"  # of a run, in its folder
INTERRUPTED = 130  # as a shell reports a program that Ctrl-C has ended

app = typer.Typer(
    name="phase2",
    help="Train and use a language model whose memory is written by association, and forgets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Preset(StrEnum):
    small, base, large = "small", "base", "large"


class Tokens(StrEnum):
    bytes, bpe = "bytes", "bpe"


class Precision(StrEnum):
    no, bf16 = "no", "bf16"


Texts = Annotated[
    list[Path],
    typer.Option("--text", help="Text file; repeatable.", exists=True, dir_okay=False),
]
Checkpoint = Annotated[
    str,
    typer.Argument(help="Folder of `phase2 train`, torch.save file, or OWNER/MODEL on the Hub."),
]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0. [default: a GPU if any]")]


def main() -> None:
    """Run the command line; the entry point of the script ``phase2``."""
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
            if "out of memory" not in str(error):
                raise  # a defect: its traceback is what helps
            fail("error: out of memory; read less at once (--accumulate, --set n_seq=...)")

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
    text: Texts,
    out: Annotated[Path, typer.Option(help="Folder for the run and the model.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    preset: Annotated[Preset, typer.Option(help="Size of the model.")] = Preset.small,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="One field of Phase2Config; repeatable."),
    ] = None,
    tokenizer: Annotated[Tokens, typer.Option(help="Bytes, or byte pairs.")] = Tokens.bytes,
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, for bpe.")] = 1024,
    held_out: Annotated[float, typer.Option(help="Share of the text to evaluate on.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Changes of the weights.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Windows a step, over all processes.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Pieces a batch is read in.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 2e-3,
    warmup: Annotated[int, typer.Option(help="Steps to the peak.")] = 50,
    weight_decay: Annotated[float, typer.Option(help="Of mixing matrices only.")] = 0.1,
    evaluate_every: Annotated[int, typer.Option(help="Steps.")] = 100,
    save_every: Annotated[int, typer.Option(help="Steps.")] = 100,
    patience: Annotated[int, typer.Option(help="Evaluations without a new best.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the text.")] = 0,
    precision: Annotated[Precision | None, typer.Option(help="[default: float32]")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave GPUs alone.")] = False,
) -> None:
    """Train a model on text files. Ctrl-C saves; --resume goes on, exactly, with the same options.

    Several GPUs: torchrun --nproc_per_node 4 -m phase2.cli train --text my.txt
    """
    from phase2.training import TrainSettings

    # most parameters are read from here, by name: --resume can change where they come from
    options = remembered(context) if resume else dict(context.params)
    settings = {
        name: options[name] for name in TrainSettings.__dataclass_fields__ if name in options
    }
    data = read_data(text, options, out if resume else None)
    values = {"vocab_size": data.tokenizer.vocab_size, **fields(options["set_"] or [])}
    run_training(data, values, TrainSettings(**settings), options, out, resume)


def remembered(context: typer.Context) -> dict[str, Any]:
    """The options of `train`: those given now, then those its run was started with."""
    path = context.params["out"] / OPTIONS
    before = json.loads(path.read_text()) if path.exists() else {}
    source = context.get_parameter_source
    defaults = {name for name in context.params if source(name).name == "DEFAULT"}
    return {**context.params, **{name: before[name] for name in defaults & before.keys()}}


def read_data(text, options, run):
    """The texts, tokenized; with the tokenizer of the run to resume, if it has one."""
    from phase2.training import text_data

    tokenizer = options["tokenizer"]
    if run and (run / "tokenizer.json").exists():
        from phase2.checkpoints import read_tokenizer

        tokenizer = read_tokenizer(run)
    return text_data(text, tokenizer, options["vocab_size"], options["held_out"])


def run_training(data, values, settings, options, out, resume) -> None:
    """Train a new model, save it as a folder of the Hub's form, and say how it went."""
    import torch

    from phase2.checkpoints import save_pretrained
    from phase2.model import create_phase2_model
    from phase2.training import CHECKPOINT, MODEL, need, write_atomically
    from phase2.training import train as train_model

    torch.manual_seed(settings.seed)
    model = create_phase2_model(preset=options["preset"], **values)
    accelerator = need("accelerate").Accelerator(
        mixed_precision=options["precision"], cpu=options["cpu"]
    )
    if accelerator.is_main_process and not any((out / x).exists() for x in (CHECKPOINT, MODEL)):
        if resume:
            typer.echo(f"phase2: there is no run in {out} to resume; starting one", err=True)
        chosen = json.dumps(options, default=str, indent=2)
        write_atomically(out / OPTIONS, lambda file: file.write(chosen.encode()))
    history = train_model(model, data, settings, out=out, resume=resume, accelerator=accelerator)
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
        return from_pretrained(checkpoint).to(place)
    except (AssertionError, RuntimeError) as error:  # of a device that is not there
        why = str(error).partition("\n")[0]
        raise ValueError(f"--device {device}: {why}") from error


def read_ids(model, text: list[Path]):
    """Text files as one row of ids for this model, (N,) int64, and the bytes a token stands for."""
    from phase2.training import read_documents, tokenize

    tokens = tokenize(read_documents(text), model.tokenizer)
    return tokens.ids.long(), tokens.bytes_per_token


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
    seed: Annotated[int | None, typer.Option(help="For the same text again.")] = None,
    device: Device = None,
) -> None:
    """Continue a prompt, token by token; without one, a session that remembers what was said."""
    import torch

    from phase2.inference import interact, stream, stream_text

    model = load(checkpoint, device)
    place = model.embedding.weight.device
    end = model.tokenizer.end
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop_token": end}
    if seed is not None:
        options["generator"] = torch.Generator(place).manual_seed(seed)
    encode = model.tokenizer.encode
    if prompt is None:
        interact(
            model,
            encode=lambda line: encode(line).tolist(),
            decode=model.tokenizer.decode,
            max_new_tokens=max_tokens,
            **options,
        )
        return
    ids = encode(prompt).long()[None].to(place)
    tokens = stream(model, ids, max_tokens, **options)
    typer.echo(prompt, nl=False)
    for piece in stream_text(tokens, model.tokenizer.decode, end):
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
@readable
def evaluate(
    checkpoint: Checkpoint,
    text: Texts,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    device: Device = None,
) -> None:
    """How well a model predicts text files: bits per byte and perplexity, with carried state."""
    from json import dumps

    from phase2.inference import evaluate as evaluate_model

    model = load(checkpoint, device)
    ids, size = read_ids(model, text)
    predicted = size * (len(ids) - 1)  # nothing predicts the first token
    scores = evaluate_model(model, ids, n_bytes=predicted or None)
    lines = (f"{name.replace('_', ' '):>14} {value:.6g}" for name, value in scores.items())
    typer.echo(dumps(scores) if json else "\n".join(lines))


@app.command()
@readable
def diagnose(
    checkpoint: Checkpoint,
    text: Texts,
    out: Annotated[Path, typer.Option(help="HTML page.")] = Path("report.html"),
    json: Annotated[Path | None, typer.Option(help="The numbers as well, as JSON.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Read at most so many.")] = 8192,
    device: Device = None,
) -> None:
    """Look into the memories while a model reads text files, and write a report."""
    from phase2.diagnostics import diagnose as look_inside

    for path in (out, json or out):
        if not path.parent.is_dir():  # now, not after the work
            raise FileNotFoundError(2, "no such folder", str(path.parent))
    if json == out:
        raise ValueError(f"--out and --json must be two files, got {out} twice")
    model = load(checkpoint, device)
    ids, _ = read_ids(model, text)
    report = look_inside(model, ids[:max_tokens])
    report.to_html(out)
    if json:
        report.to_json(json)
    typer.echo(str(report))
    typer.echo(f"the report is {out}")


if __name__ == "__main__":
    main()
