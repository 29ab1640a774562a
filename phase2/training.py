# Generated from notebooks/08_training.ipynb; edit the notebook, not this file.
"""Training."""

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import pickle
import random
import re
import signal
import sys
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phase2.decay import warn_caller
from phase2.model import check_fields, check_value, one_or_fields, real, uncompiled, whole

__all__ = [
    "ByteTokenizer",
    "need",
    "from_utf8",
    "ENDS",
    "BPETokenizer",
    "train_bpe",
    "check_no_name",
    "read_documents",
    "split_documents",
    "Tokens",
    "TextData",
    "tokenize",
    "as_tokenizer",
    "text_data",
    "TextWindows",
    "window_starts",
    "batch_starts",
    "bits_per_byte",
    "SETTING_RULES",
    "TrainSettings",
    "LOWEST",
    "schedule",
    "MIXING",
    "parameter_groups",
    "Run",
    "piece_size",
    "pieces",
    "read_windows",
    "loss_of",
    "diverged",
    "gradient",
    "log_of",
    "train_step",
    "check_run",
    "check_model",
    "new_accelerator",
    "as_accelerator",
    "warn_of_another",
    "prepare",
    "held_out_bits",
    "copy_weights",
    "evaluate_run",
    "out_of_patience",
    "CheckpointError",
    "check_file",
    "write_atomically",
    "read_torch",
    "check_weights",
    "rng_state",
    "set_rng_state",
    "CHECKPOINT",
    "HISTORY",
    "TOKENIZER",
    "CONFIG",
    "MODEL",
    "fingerprint",
    "checkpoint",
    "save_run",
    "FREE",
    "changes",
    "resume_run",
    "read_history",
    "write_history",
    "HANGUP",
    "Interruption",
    "repeatable",
    "save_tokenizer",
    "foreign_files",
    "begin",
    "record",
    "SHOWN",
    "summary",
    "progress_bar",
    "where_saved",
    "run_steps",
    "train",
    "unwrap",
    "finish",
    "run_to_the_end",
]


# %% notebooks/08_training.ipynb#byte-tokenizer
class ByteTokenizer:
    """Text as its UTF-8 bytes: nothing to learn, and no text that it cannot write.

    Attributes:
        vocab_size: 256.
        end: 0, the byte between two documents; in a text it would read as an end, too.
    """

    vocab_size, end = 256, 0

    def encode(self, text):
        """A str or bytes -> ids, (N,) uint8."""
        if not isinstance(text, str | bytes | bytearray):  # bytearray(3) would be three zeros
            raise TypeError(f"text must be str or bytes, got {type(text).__name__}")
        raw = bytearray(text.encode() if isinstance(text, str) else text)
        if not raw:  # which frombuffer refuses
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(raw, dtype=torch.uint8)

    def decode(self, ids):
        """Ids -> str; what is no UTF-8, or no byte, becomes the replacement character."""
        ids = torch.as_tensor(ids).flatten().tolist()
        known = (i if 0 <= i < 256 else 255 for i in ids)  # 255 is in no UTF-8
        return bytes(known).decode(errors="replace")


# %% notebooks/08_training.ipynb#need
def need(name):
    """Import a module that comes with the extra `train`.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package = name.partition(".")[0]
        message = f'{package} is not installed; it comes with: pip install "phase2[train]"'
        raise ImportError(message) from None  # one error is enough to read


# %% notebooks/08_training.ipynb#from-utf8
def from_utf8(raw):
    """Bytes -> str. ValueError if they are no UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        place = f"byte {error.start} of {len(raw)}"
        raise ValueError(f"byte pairs need UTF-8, {place} is none ({error.reason})") from error


# %% notebooks/08_training.ipynb#bpe
# what may end a document: ours, or what others use
ENDS = ("<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class BPETokenizer:
    """Byte-pair encoding by the library `tokenizers`, with the interface of ByteTokenizer.

    Args:
        tokenizer: a `tokenizers.Tokenizer` that has one of the tokens `ENDS`; the first is used.

    Raises:
        ValueError: it has none of them.
    """

    def __init__(self, tokenizer):
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())  # a copy: that of others stays
        tokenizer.no_truncation(), tokenizer.no_padding()  # text is all of the text
        tokenizer.encode_special_tokens = True  # "<|end|>" in a text is seven letters, not an end
        ends = [i for i in map(tokenizer.token_to_id, ENDS) if i is not None]
        if not ends:
            raise ValueError(
                f"tokenizer must have a token that ends a document, {' or '.join(ENDS)}"
            )
        self.tokenizer, self.end = tokenizer, ends[0]
        self.vocab_size = tokenizer.get_vocab_size()

    def __reduce__(self):  # a pickled one would have forgotten encode_special_tokens
        return BPETokenizer, (self.tokenizer,)

    def encode(self, text):
        """A str, or UTF-8 bytes -> ids, (N,) int32."""
        text = text if isinstance(text, str) else from_utf8(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return torch.tensor(ids, dtype=torch.int32)

    def decode(self, ids):
        """Ids -> str."""
        ids = torch.as_tensor(ids).flatten().tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=False)


# %% notebooks/08_training.ipynb#train-bpe
def train_bpe(documents, vocab_size):
    """Learn a byte-pair encoding from a list of str.

    Raises:
        ValueError: `vocab_size` leaves no room beside the 256 bytes and the end, or is above a
            million.
    """
    check_value("vocab_size", vocab_size, whole(258, highest=10**6))  # beside the bytes, the end
    library = need("tokenizers")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[ENDS[0]],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return BPETokenizer(tokenizer)


# %% notebooks/08_training.ipynb#check-no-name
def check_no_name(text):
    """Refuse a str that is the name of a file, with a ValueError; warn of one that looks like it.

    Names of files are given as Path: a str is the text itself.
    """
    if len(text) < 1000 and os.path.isfile(text):
        raise ValueError(f"{text!r} is the text itself; to read that file, give a Path")
    if re.fullmatch(r"\S{1,250}\.\w{1,5}", text):
        warn_caller(f"{text!r} is read as a text; a file would be given as a Path", UserWarning)


# %% notebooks/08_training.ipynb#documents
def read_documents(texts):
    """A text (str, bytes), a path, or a list of them -> list of bytes, one a document.

    Raises:
        TypeError: something is no text.
        ValueError: there is no text; or see :func:`check_no_name`.
    """
    kinds = str | bytes | bytearray | os.PathLike
    if hasattr(texts, "read"):  # which is iterable, a line at a time
        raise TypeError("texts must be str, bytes, Path or several, got a file: give its Path")
    if isinstance(texts, Mapping):  # which is its keys
        kind = type(texts).__name__
        raise TypeError(f"texts must be str, bytes, Path or several, got {kind}: give its column")
    several = isinstance(texts, Iterable) and not isinstance(texts, kinds)
    texts = list(texts) if several else [texts]
    for text in texts:
        if not isinstance(text, kinds):
            raise TypeError(f"texts must be str, bytes, Path or several, got {type(text).__name__}")
        if isinstance(text, str):
            check_no_name(text)
    texts = [text.encode() if isinstance(text, str) else text for text in texts]
    read = [
        bytes(text) if isinstance(text, bytes | bytearray) else Path(text).read_bytes()
        for text in texts
    ]
    if not any(read):
        raise ValueError("texts must hold some text, got none")
    return [document for document in read if document]


# %% notebooks/08_training.ipynb#split-documents
def split_documents(documents, held_out):
    """Cut a list of documents in two, the last `held_out` of all bytes in the second part.

    Returns:
        Two lists of bytes; a document is cut only between two characters.
    """
    cut = round((1 - held_out) * sum(map(len, documents)))
    first, second = [], []
    for document in documents:
        here = min(max(cut, 0), len(document))
        while here < len(document) and document[here] & 0xC0 == 0x80:  # inside a character
            here += 1
        first.append(document[:here]), second.append(document[here:])
        cut -= len(document)
    return [d for d in first if d], [d for d in second if d]


# %% notebooks/08_training.ipynb#data
class Tokens(NamedTuple):
    """A tokenized text: its ids, (N,), and how many bytes of text they stand for."""

    ids: Tensor
    size: int

    @property
    def bytes_per_token(self):
        """Bytes of text that a token stands for, on average."""
        return self.size / max(1, len(self.ids))


class TextData(NamedTuple):
    """What a model is trained on, what is held out from it, and the tokenizer of both."""

    train: Tokens
    held_out: Tokens
    tokenizer: object


def tokenize(documents, tokenizer):
    """A list of bytes -> Tokens, the documents one after the other with an `end` between two."""
    pieces = []
    for document in documents:
        ids = tokenizer.encode(document)
        pieces += [ids.new_tensor([tokenizer.end]), ids] if pieces else [ids]
    size = sum(map(len, documents)) + max(0, len(documents) - 1)
    return Tokens(torch.cat(pieces) if pieces else tokenizer.encode(""), size)


# %% notebooks/08_training.ipynb#as-tokenizer
def as_tokenizer(tokenizer):
    """A tokenizer as it is; one of `tokenizers` or `transformers` in a BPETokenizer.

    Raises:
        ValueError: it has no token that ends a document.
        TypeError: a class, or it lacks `encode`, `decode`, `end` or `vocab_size`, see
            :class:`ByteTokenizer`.
    """
    if isinstance(tokenizer, type):
        raise TypeError(f"tokenizer must be a tokenizer, got the class {tokenizer.__name__}")
    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)  # what `transformers` wraps
    if type(tokenizer).__module__.partition(".")[0] == "tokenizers":
        return BPETokenizer(getattr(tokenizer, "_tokenizer", tokenizer))  # of a ready-made class
    interface = ("encode", "decode", "end", "vocab_size")
    if missing := [name for name in interface if not hasattr(tokenizer, name)]:
        kind = type(tokenizer).__name__
        raise TypeError(f"tokenizer must have {', '.join(interface)}; {kind} lacks {missing[0]}")
    return tokenizer


# %% notebooks/08_training.ipynb#text-data
def text_data(texts, tokenizer="bytes", vocab_size=None, held_out=0.1):
    """Read texts, hold out their end, and turn them into numbers.

    Args:
        texts: a text (str, bytes), a file (Path), or a list of them; several are read as documents.
        tokenizer: "bytes", "bpe" to learn byte pairs from the training part, or see
            :func:`as_tokenizer`.
        vocab_size: number of tokens of "bpe"; None is 1024.
        held_out: share of the bytes to hold out, from 0 to below 1.

    Returns:
        TextData.

    Raises:
        ValueError: there is no text, `held_out` or `tokenizer` is not one of these, a `vocab_size`
            without "bpe", or a text that is no UTF-8 with it.
        TypeError: `texts` are no text, or `tokenizer` is not a tokenizer.
        OSError: a file cannot be read.
    """
    if not isinstance(held_out, Real) or not 0 <= held_out < 1:
        raise ValueError(f"held_out must be from 0 to below 1, got {held_out!r}")
    if isinstance(tokenizer, str) and tokenizer not in ("bytes", "bpe"):
        raise ValueError(f"tokenizer must be 'bytes', 'bpe' or a tokenizer, got {tokenizer!r}")
    if vocab_size is not None and tokenizer != "bpe":
        raise ValueError(f"vocab_size is for tokenizer='bpe', got {vocab_size} without it")
    first, second = split_documents(read_documents(texts), held_out)
    if tokenizer == "bytes":
        tokenizer = ByteTokenizer()
    elif tokenizer == "bpe":
        size = 1024 if vocab_size is None else vocab_size
        tokenizer = train_bpe([from_utf8(document) for document in first], size)
    tokenizer = as_tokenizer(tokenizer)
    return TextData(tokenize(first, tokenizer), tokenize(second, tokenizer), tokenizer)


# %% notebooks/08_training.ipynb#windows
class TextWindows(torch.utils.data.Dataset):
    """The windows of a text, one after the other: each is (input_ids, targets), two (n_seq,).

    Args:
        ids: (N,) integers.
        n_seq: length of a window.

    Raises:
        ValueError: `n_seq` is below 1.
    """

    def __init__(self, ids, n_seq):
        check_value("n_seq", n_seq, whole(1))
        self.ids, self.n_seq = ids, n_seq

    def __len__(self):
        return max(0, len(self.ids) - 1) // self.n_seq

    def __getitem__(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        window = self.ids[index * self.n_seq : (index + 1) * self.n_seq + 1].long()
        return window[:-1], window[1:]


# %% notebooks/08_training.ipynb#order
@functools.lru_cache(maxsize=2)
def window_starts(length, n_seq, seed, epoch):
    """Where the windows of one pass over a text begin, in random order and shifted at random.

    Args:
        length: tokens in the text, more than n_seq.
        n_seq: length of a window.
        seed, epoch: which pass of which run.

    Returns:
        (max(1, length // n_seq − 1),) int64.
    """
    generator = torch.Generator().manual_seed((1_000_003 * seed + epoch) % 2**32)
    count = max(1, length // n_seq - 1)
    slack = length - 1 - count * n_seq
    options = {"generator": generator, "device": "cpu"}
    shift = torch.randint(0, slack + 1, (), **options)
    return shift + n_seq * torch.randperm(count, **options)


def batch_starts(length, n_seq, batch_size, seed, step):
    """Where the windows of a step's batch begin, (batch_size,)."""
    count = max(1, length // n_seq - 1)
    places = range(step * batch_size, (step + 1) * batch_size)
    starts = [window_starts(length, n_seq, seed, place // count)[place % count] for place in places]
    return torch.stack(starts)


# %% notebooks/08_training.ipynb#bits
def bits_per_byte(loss, bytes_per_token=1.0):
    """Equation (eq-bits-per-byte): mean loss in nats a token -> bits a byte of text."""
    return loss / (math.log(2) * bytes_per_token)


# %% notebooks/08_training.ipynb#settings
SETTING_RULES = {  # what is allowed in each field of `TrainSettings`
    **dict.fromkeys(
        ["steps", "batch_size", "accumulate", "patience", "evaluate_windows"], whole(1)
    ),
    **dict.fromkeys(["log_every", "evaluate_every", "save_every"], whole(1)),
    **dict.fromkeys(["warmup", "seed"], whole(0)),
    **dict.fromkeys(["learning_rate", "clip"], real(0, above=True)),
    "weight_decay": real(0),
}


@dataclass(frozen=True)
class TrainSettings:
    """The choices of a training run; `SETTING_RULES` has what is allowed."""

    steps: int = 1000  #: changes of the weights
    batch_size: int = 8  #: windows of n_seq tokens a step, over all processes
    accumulate: int = 1  #: pieces that a process works through one after the other, to save memory
    learning_rate: float = 2e-3  #: at its peak
    warmup: int = 50  #: steps to the peak
    weight_decay: float = 0.1  #: of matrices that mix features
    clip: float = 1.0  #: largest norm of the gradient
    log_every: int = 10  #: steps between two snapshots of the memory
    evaluate_every: int = 100  #: steps
    evaluate_windows: int = 64  #: of held-out text, spread over it
    save_every: int = 100  #: steps
    patience: int = 1000  #: evaluations without a new best before stopping
    seed: int = 0  #: of the order of the windows

    def __post_init__(self):
        check_fields(self, SETTING_RULES)


# %% notebooks/08_training.ipynb#schedule
LOWEST = 0.05  # of the peak, at the end


def schedule(step, settings):
    """Learning rate of a step, counted from 0: equation (eq-schedule)."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * done)) / 2)


# %% notebooks/08_training.ipynb#groups
MIXING = {"qkv", "out", "up", "down", "head"}  # names of the matrices that mix features


def parameter_groups(model, weight_decay):
    """The two groups of equation (eq-adamw): matrices that mix features decay, nothing else does.

    Returns:
        list of two dicts with `params` and `weight_decay`, for an optimizer of torch.
    """
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if MIXING.isdisjoint(name.split(".")) else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


# %% notebooks/08_training.ipynb#run
@dataclass
class Run:
    """Everything of a training run that changes, and what a step needs.

    Attributes:
        model: the model, as prepared by Accelerate.
        optimizer: its optimizer, likewise.
        data: TextData.
        settings: TrainSettings.
        accelerator: accelerate.Accelerator.
        folder: Path to save to, or None.
        step: steps done.
        history: one dict a step.
        best: dict with `step`, `bits` and `weights` of the best evaluation, or None before any.
        stopping: has any process been asked to stop?
    """

    model: Any
    optimizer: Any
    data: TextData
    settings: TrainSettings
    accelerator: Any
    folder: Path | None = None
    step: int = 0
    history: list = field(default_factory=list)
    best: dict | None = None
    stopping: bool = False

    @property
    def plain_model(self):
        """The model itself, out of the wrapping that shares it among processes."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


# %% notebooks/08_training.ipynb#pieces
def piece_size(settings, accelerator):
    """Windows that a process reads at once."""
    return settings.batch_size // (settings.accumulate * accelerator.num_processes)


def pieces(run):
    """This process's share of the batch of this step: a list of `accumulate` (rows, n_seq + 1)."""
    settings, accelerator, ids = run.settings, run.accelerator, run.data.train.ids
    n_seq = run.plain_model.config.n_seq
    starts = batch_starts(len(ids), n_seq, settings.batch_size, settings.seed, run.step)
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    windows = read_windows(ids, mine, n_seq, accelerator.device)
    return windows.split(piece_size(settings, accelerator))


def read_windows(ids, starts, length, device):
    """The windows that begin at `starts`, with the token after each: (rows, length + 1) int64."""
    return ids[starts[:, None] + torch.arange(length + 1, device="cpu")].long().to(device)


def loss_of(model, window, diagnose=False):
    """Mean loss of the windows (rows, N + 1) in nats a token, and diagnostics if asked."""
    found = model(window[:, :-1], return_diagnostics=diagnose)
    logits, diagnostics = found if diagnose else (found, None)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
    return loss, diagnostics


# %% notebooks/08_training.ipynb#diverged
def diverged(settings, step, found):
    """Raise the FloatingPointError of :func:`train`, saying what was found in which step."""
    rate = settings.learning_rate
    raise FloatingPointError(f"step {step}: {found}; lower learning_rate (now {rate:g})")


# %% notebooks/08_training.ipynb#gradient
def gradient(run, diagnose):
    """Leave the gradient of the whole batch, averaged over processes, on the parameters.

    Returns:
        The loss of this process's share, a tensor, and diagnostics of its first piece if asked.
    """
    total, seen, parts = 0.0, None, pieces(run)
    for number, piece in enumerate(parts, start=1):
        last = number == len(parts)  # processes exchange gradients once, after the last piece
        alone = contextlib.nullcontext() if last else run.accelerator.no_sync(run.model)
        with alone:
            try:
                loss, diagnostics = loss_of(run.model, piece, diagnose and number == 1)
            except ValueError as error:  # the memory refuses rates that are not finite
                diverged(run.settings, run.step + 1, str(error))
            run.accelerator.backward(loss / len(parts))
        total = total + loss.detach() / len(parts)
        seen = seen or diagnostics
    return total, seen


# %% notebooks/08_training.ipynb#look
def log_of(diagnostics):
    """Per layer, what the log keeps of the diagnostics of a model: lists of floats."""
    stability = diagnostics["stability_metrics"]
    return {
        "gamma": [gamma.mean().item() for gamma in diagnostics["gamma_values"]],
        "snr": [layer["mean_snr"] for layer in diagnostics["snr_stats"]],
        "resonant_share": [x["resonant_share"] for x in diagnostics["resonance_info"]],
        "energy": [layer["energy"] for layer in stability],
        "stable_ratio": [layer["stable_ratio"] for layer in stability],
    }


# %% notebooks/08_training.ipynb#step
def train_step(run, stop=False):
    """Read a batch, change the weights once, and say how it went.

    Args:
        run: Run; its `step` is advanced.
        stop: has this process been asked to stop? All learn of it.

    Returns:
        dict with `step`, `loss` (nats a token), `bits_per_byte`, `learning_rate`, `gradient_norm`,
        and every `log_every` steps what :func:`log_of` keeps of the diagnostics.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; this step changes no weight.
    """
    settings, accelerator = run.settings, run.accelerator
    rate = schedule(run.step, settings)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.model.train()
    run.optimizer.zero_grad()
    loss, seen = gradient(run, accelerator.is_main_process and run.step % settings.log_every == 0)
    asked = torch.full_like(loss, stop)
    loss, asked = accelerator.reduce(torch.stack((loss, asked)), "mean").tolist()
    norm = float(accelerator.clip_grad_norm_(run.model.parameters(), settings.clip))
    if not math.isfinite(loss + norm):
        found = f"the loss is {loss:.3g}, the norm of its gradient {norm:.3g}"
        diverged(settings, run.step + 1, found)
    run.optimizer.step()
    run.step, run.stopping = run.step + 1, asked > 0
    entry = {"step": run.step, "loss": loss}
    entry["bits_per_byte"] = bits_per_byte(loss, run.data.train.bytes_per_token)
    entry |= {"learning_rate": rate, "gradient_norm": norm}
    return entry | (log_of(seen) if seen else {})


# %% notebooks/08_training.ipynb#check
def check_run(config, data, settings, accelerator):
    """Refuse a run that cannot work.

    Raises:
        ValueError: text too short, vocabulary too small, an id beyond it, a batch that cannot be
            shared equally, or an accelerator that shards the model, trains in float16, has no
            float64 or accumulates gradients of its own.
    """
    length, processes = len(data.train.ids), accelerator.num_processes
    if length <= config.n_seq:
        raise ValueError(
            f"the text to train on must be longer than n_seq = {config.n_seq} tokens, got {length}"
        )
    if data.tokenizer.vocab_size > config.vocab_size:
        need_ids, has = data.tokenizer.vocab_size, config.vocab_size
        raise ValueError(
            f"vocab_size must be at least that of the tokenizer, {need_ids}; got {has}"
        )
    for ids in (part.ids.numpy() for part in data[:2] if len(part.ids)):
        if wrong := [i for i in (ids.min(), ids.max()) if not 0 <= i < config.vocab_size]:
            allowed = f"from 0 to below vocab_size = {config.vocab_size}"
            raise ValueError(f"ids of the text must be {allowed}, got {wrong[0]}")
    if settings.batch_size % (settings.accumulate * processes):
        shares = f"accumulate ({settings.accumulate}) × processes ({processes})"
        raise ValueError(f"batch_size must be a multiple of {shares}, got {settings.batch_size}")
    if accelerator.device.type == "mps":
        raise ValueError("accelerator must have float64, got mps; Accelerator(cpu=True) has it")
    kind = str(accelerator.distributed_type.value)
    if accelerator.mixed_precision not in ("no", "bf16") or "FSDP" in kind or "DEEPSPEED" in kind:
        got = f"{accelerator.mixed_precision}, {kind}"
        raise ValueError(f"accelerator must use float32 or bf16 and whole models, got {got}")
    if (own := accelerator.gradient_accumulation_steps) != 1:
        why = f"got gradient_accumulation_steps = {own}; there is accumulate for that"
        raise ValueError(f"accelerator must not accumulate, {why}")


# %% notebooks/08_training.ipynb#check-model
def check_model(model):
    """Refuse a model that cannot be trained.

    Raises:
        TypeError: no Phase2IntegratedModel, compiled or not (`DataParallel` is none; see torchrun).
        ValueError: all its parameters are frozen, or some are float16.
    """
    parameters = list(uncompiled(model).parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise ValueError("model must have parameters to train, all of them are frozen")
    if any(parameter.dtype == torch.float16 for parameter in parameters):
        raise ValueError("model must not be of float16, in which training overflows: model.float()")


def new_accelerator(cpu=False, **options):
    """An Accelerator of CUDA or the CPU: not all others that it would choose have float64."""
    return need("accelerate").Accelerator(cpu=cpu or not torch.cuda.is_available(), **options)


def as_accelerator(accelerator):
    """An Accelerator as it is, a new one for None; TypeError for anything else."""
    if accelerator is None:
        return new_accelerator()
    if not isinstance(accelerator, need("accelerate").Accelerator):
        kind = type(accelerator).__name__
        raise TypeError(f"accelerator must be an accelerate.Accelerator, got {kind}")
    return accelerator


# %% notebooks/08_training.ipynb#prepare
def warn_of_another(tokenizer, model):
    """Warn if a model that was trained with one tokenizer is to be trained with another."""
    before = getattr(model, "tokenizer", None)
    names = [
        t.tokenizer.to_str() if isinstance(t, BPETokenizer) else type(t)
        for t in (before, tokenizer)
    ]
    if before is not None and names[0] != names[1]:
        message = "the model has another tokenizer than the text, and gets that of the text"
        warn_caller(f"{message}; to keep it, text_data(…, model.tokenizer)", UserWarning)


def prepare(model, data, settings, accelerator, folder=None):
    """A Run at step 0: the model on its device, AdamW over its groups."""
    if not isinstance(data, TextData):
        raise TypeError(f"data must be TextData, from text_data(…), got {type(data).__name__}")
    check_model(model)
    check_run(model.config, data, settings, accelerator)
    if settings.warmup > settings.steps:
        late = f"{settings.warmup}, is longer than the run, {settings.steps} steps"
        warn_caller(f"warmup, {late}: the learning rate does not reach its peak", UserWarning)
    warn_of_another(data.tokenizer, model)
    groups = parameter_groups(model, settings.weight_decay)
    rates = {"lr": settings.learning_rate, "betas": (0.9, 0.95)}
    optimizer = torch.optim.AdamW(groups, **rates, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return Run(model, optimizer, data, settings, accelerator, folder)


# %% notebooks/08_training.ipynb#evaluate
@torch.no_grad()
def held_out_bits(run):
    """Bits per byte of held-out windows, spread over the held-out text; None if there is none."""
    tokens, accelerator, model = run.data.held_out, run.accelerator, run.plain_model
    length = max(1, min(model.config.n_seq, len(tokens.ids) - 1))
    windows = (len(tokens.ids) - 1) // length
    if windows < 1:
        return None
    count = min(windows, run.settings.evaluate_windows)
    starts = length * torch.linspace(0, windows - 1, count, device="cpu").round().long()
    mine = starts[accelerator.process_index :: accelerator.num_processes]
    model.eval()
    total = torch.zeros((), device=accelerator.device)
    for some in mine.split(piece_size(run.settings, accelerator)) if len(mine) else ():
        rows = read_windows(tokens.ids, some, length, accelerator.device)
        total += loss_of(model, rows)[0] * len(some)
    loss = accelerator.reduce(total, "sum").item() / count
    return bits_per_byte(loss, tokens.bytes_per_token)


# %% notebooks/08_training.ipynb#best
def copy_weights(model):
    """The state dict of a model, copied to the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def evaluate_run(run):
    """Evaluate, keep the weights if they are the best, return `held_out` in bits per byte."""
    try:
        bits = held_out_bits(run)
    except ValueError as error:  # the memory refuses rates that are not finite
        diverged(run.settings, run.step, str(error))
    if bits is None:
        return {}
    if math.isfinite(bits) and (run.best is None or bits < run.best["bits"]):
        run.best = {"step": run.step, "bits": bits, "weights": copy_weights(run.plain_model)}
    return {"held_out": bits}


def out_of_patience(run):
    """Have `patience` evaluations gone by without a new best?"""
    since = run.step - run.best["step"] if run.best else 0
    return since >= run.settings.patience * run.settings.evaluate_every


# %% notebooks/08_training.ipynb#check-file
class CheckpointError(ValueError):
    """A file is no checkpoint, or not one that fits; the message names the file and the reason."""


def check_file(path):
    """Refuse, with a CheckpointError, what is no file or may not be read."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: may not be read (its permissions)")


# %% notebooks/08_training.ipynb#atomic
def write_atomically(path, write):
    """Write a file so that it is whole at every moment: the old one, then the new one.

    Args:
        path: the file; its folder is made.
        write: called with a binary file open for writing, not yet in its place.

    Raises:
        OSError: it cannot be written; names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:  # in a folder of its own: another process may be writing this file, too
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
            with open(temporary := Path(folder) / path.name, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())  # on the disk before the old one goes
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save puts an error of its own in the place of a full disk, or of Ctrl-C
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            cause.filename = str(path)
        if isinstance(cause, OSError | KeyboardInterrupt):
            raise cause from None
        raise


# %% notebooks/08_training.ipynb#read
def read_torch(path):
    """Read what `torch.save` has written, tensors and plain values only.

    Raises:
        CheckpointError: no such file, cut short, damaged, or holding anything else; nothing in the
            file is run.
    """
    path = Path(path)
    check_file(path)
    try:
        # torch.load does not compare checksums
        damaged = zipfile.ZipFile(path).testzip() if zipfile.is_zipfile(path) else None
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols
            state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"holds {named[1]}," if named else "is"
        why = f"{what} no checkpoint of tensors and plain values; refused, nothing in it was run"
        if named and named[1].startswith("phase2."):
            why += "; save config.to_dict() and model.state_dict()"
        raise CheckpointError(f"{path}: {why}") from error
    except Exception as error:  # a damaged file can fail in any way
        why = f"cut short, damaged, or no checkpoint ({type(error).__name__})"
        raise CheckpointError(f"{path}: {why}") from error
    if damaged:
        raise CheckpointError(f"{path}: damaged, the checksum of {damaged} is wrong")
    return state


# %% notebooks/08_training.ipynb#fit
def check_weights(model, weights, path):
    """Refuse a state dict that is not one of a model like this.

    Raises:
        CheckpointError: names or shapes differ from the model's, or what is no tensor of floats on
            a device; naming the first.
    """
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path}: weights must be a dict, got {type(weights).__name__}")
    wanted = model.state_dict()
    for name in [*wanted, *weights]:
        if name not in weights:
            raise CheckpointError(f"{path}: lacks {name}, which the configuration asks for")
        if name not in wanted:
            raise CheckpointError(f"{path}: has {name}, which the configuration does not know")
        got, shape = weights[name], tuple(wanted[name].shape)
        if not isinstance(got, Tensor) or not got.is_floating_point():
            raise CheckpointError(f"{path}: {name} must be a tensor of floats")
        if got.layout != torch.strided or got.is_meta:
            raise CheckpointError(f"{path}: {name} must be dense, got {got.layout} on {got.device}")
        if tuple(got.shape) != shape:
            got = tuple(got.shape)
            raise CheckpointError(
                f"{path}: {name} has shape {got}, its configuration asks for {shape}"
            )


# %% notebooks/08_training.ipynb#rng
def rng_state():
    """The states of the random number generators of this process, as plain values."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, keys.tolist(), *rest)
    return state


def set_rng_state(state):
    """The inverse of `rng_state`, for the generators that are here."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(state["numpy"])


# %% notebooks/08_training.ipynb#files
CHECKPOINT = "training.pt"
HISTORY = "history.jsonl"
TOKENIZER = "tokenizer.json"
CONFIG = "config.json"  # chapter 11 writes it, and the next
MODEL = "model.safetensors"


# %% notebooks/08_training.ipynb#save
def fingerprint(data):
    """A short name for a text and its tokenization: other data, another name."""
    digest = hashlib.sha256()
    for tokens in (data.train, data.held_out):
        digest.update(f"{len(tokens.ids)} {tokens.ids.dtype} {tokens.size} ".encode())
        digest.update(tokens.ids.contiguous().numpy())
    return digest.hexdigest()[:16]


def checkpoint(run, rng):
    """Everything the next step depends on, as tensors and plain values."""
    return {
        "model_state_dict": run.plain_model.state_dict(),
        "config": run.plain_model.config.to_dict(),
        "train_loss": run.history[-1]["loss"] if run.history else None,
        "optimizer_state_dict": run.optimizer.state_dict(),
        "step": run.step,
        "precision": run.accelerator.mixed_precision,
        "settings": asdict(run.settings),
        "data": fingerprint(run.data),
        "rng": rng,
        "best": run.best,
    }


def save_run(run):
    """Write `training.pt` atomically; every process must call it, one writes."""
    rng = need("accelerate.utils").gather_object([rng_state()])
    if run.accelerator.is_main_process:
        with open(run.folder / HISTORY, "a") as log:
            os.fsync(log.fileno())  # on the disk before a checkpoint that counts its lines
        state = checkpoint(run, rng)
        write_atomically(run.folder / CHECKPOINT, lambda file: torch.save(state, file))
        (run.folder / MODEL).unlink(missing_ok=True)  # of this run as it was when it had ended
    run.accelerator.wait_for_everyone()


# %% notebooks/08_training.ipynb#changes
FREE = ("save_every", "patience", "accumulate")  # a step depends on none but for rounding


def changes(before, now):
    """The entries in which two dicts differ, but for those of `FREE`, in words."""
    names = [name for name in {**before, **now} if name not in FREE]
    pairs = ((name, before.get(name), now.get(name)) for name in names)
    return ", ".join(f"{name} was {a!r} and is {b!r}" for name, a, b in pairs if a != b)


# %% notebooks/08_training.ipynb#resume
def resume_run(run):
    """Put a Run at step 0 where `training.pt` in its folder says.

    Raises:
        CheckpointError: the file cannot be read, or belongs to another run.
    """
    path = run.folder / CHECKPOINT
    state, model = read_torch(path), run.plain_model
    now = {"settings": asdict(run.settings), "config": model.config.to_dict()}
    try:
        for part, values in now.items():
            if changed := changes(state[part], values):
                why = f"a run goes on as it began, but {part} changed: {changed}"
                raise CheckpointError(
                    f"{path}: {why}; or start a new run with its model (from_pretrained, or --init)"
                )
        precision = {"precision": run.accelerator.mixed_precision}
        if changed := changes({"precision": state["precision"]}, precision):
            raise CheckpointError(f"{path}: a run goes on as it began, but {changed}")
        if state["data"] != fingerprint(run.data):
            raise CheckpointError(f"{path}: text, tokenizer or held_out are not those of this run")
        history = read_history(run.folder / HISTORY, state["step"])
        check_weights(model, state["model_state_dict"], path)
        model.load_state_dict(state["model_state_dict"])
        run.optimizer.load_state_dict(state["optimizer_state_dict"])
        run.step, run.best, run.history = state["step"], state["best"], history
        if run.accelerator.process_index < len(state["rng"]):
            set_rng_state(state["rng"][run.accelerator.process_index])
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: not the checkpoint of a training run ({reason})") from error


# %% notebooks/08_training.ipynb#history
def read_history(path, steps):
    """The first `steps` lines of a log, one dict each; without those after them.

    Raises:
        CheckpointError: there are fewer, or one is no JSON, or not of its step.
    """
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    if len(lines) < steps:
        raise CheckpointError(f"{path}: has {len(lines)} lines, the checkpoint is of step {steps}")
    try:
        history = [json.loads(line) for line in lines[:steps]]
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    for step, entry in enumerate(history, start=1):
        if not isinstance(entry, dict) or entry.get("step") != step:
            raise CheckpointError(f"{path}: damaged, line {step} is not of step {step}")
    return history


def write_history(path, history):
    """Write a log anew, one line an entry."""
    text = "".join(json.dumps(entry) + "\n" for entry in history)
    write_atomically(path, lambda file: file.write(text.encode()))


# %% notebooks/08_training.ipynb#interrupt
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none


class Interruption:
    """Within it, the first Ctrl-C or other signal to end is noted; a Ctrl-C after it interrupts.

    Attributes:
        signal: the number of the signal, or None.
    """

    def __init__(self):
        self.signal, self.handlers = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others get no signals
            for number in (signal.SIGINT, signal.SIGTERM, HANGUP):
                if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                    self.handlers[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or number

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def leave(self, message):
        """Stop for good: KeyboardInterrupt after Ctrl-C, else SystemExit; say why."""
        if self.signal in (None, signal.SIGINT):  # None: another process was interrupted
            raise KeyboardInterrupt(message)
        with contextlib.suppress(OSError):  # there may be no terminal any more
            print(message, file=sys.stderr)  # which SystemExit with a number does not
        raise SystemExit(128 + self.signal)


# %% notebooks/08_training.ipynb#repeat
@contextlib.contextmanager
def repeatable(device):
    """Within it, a GPU uses kernels with the same result every time, where there are any."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS would not be
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


# %% notebooks/08_training.ipynb#save-tokenizer
def save_tokenizer(tokenizer, folder):
    """Write `tokenizer.json` if there is more to say than "bytes"; warn if it cannot be said."""
    path = Path(folder) / TOKENIZER
    if isinstance(tokenizer, BPETokenizer):
        write_atomically(path, lambda file: file.write(tokenizer.tokenizer.to_str().encode()))
        return
    path.unlink(missing_ok=True)
    if not isinstance(tokenizer, ByteTokenizer):
        kind = type(tokenizer).__name__
        message = f"a {kind} is not saved: keep it, and set model.tokenizer after loading"
        warn_caller(message, UserWarning)


# %% notebooks/08_training.ipynb#foreign-files
def foreign_files(folder):
    """Files of a model in a folder without a run; one that has only begun has its tokenizer."""
    if (folder / CHECKPOINT).exists():
        return []
    names = [CONFIG, MODEL] if (folder / HISTORY).exists() else [CONFIG, MODEL, TOKENIZER]
    return [folder / name for name in names if (folder / name).exists()]


# %% notebooks/08_training.ipynb#begin
def begin(run, resume):
    """Start or go on in the folder of a run, if it has one.

    Raises:
        FileExistsError: something of a run is there, and `resume` is False; or files that are of
            no run.
        CheckpointError: see :func:`read_history` and :func:`resume_run`.
    """
    if run.folder is None:
        return
    path, history = run.folder / CHECKPOINT, run.folder / HISTORY
    if path.exists():
        if not resume:
            raise FileExistsError(f"{path} exists: resume, or choose another folder")
        resume_run(run)
    elif history.exists():  # of a run that was stopped before it was saved, or is under way
        lines = history.read_text(errors="replace").split("\n")
        cut_short = lines[-1][:1] in ("", "{")  # what is behind the last end of a line, if anything
        read_history(history, len(lines) - cut_short)
        if not resume:
            why = "of a run that has saved nothing yet: remove it, or choose another folder"
            raise FileExistsError(f"{history} exists, {why}")
    for file in foreign_files(run.folder):
        raise FileExistsError(f"{file} exists, without its run: choose another folder")
    run.accelerator.wait_for_everyone()  # all have read before one writes
    if run.accelerator.is_main_process:
        write_history(run.folder / HISTORY, run.history)
        save_tokenizer(run.data.tokenizer, run.folder)


def record(run, entry):
    """Keep an entry of the history, in memory and in the log."""
    run.history.append(entry)
    if run.folder and run.accelerator.is_main_process:
        with open(run.folder / HISTORY, "a") as file:
            file.write(json.dumps(entry) + "\n")


# %% notebooks/08_training.ipynb#bar
# in this order, for a narrow terminal cuts the end
SHOWN = {
    "held_out": "held out",
    "bits_per_byte": "bits/byte",
    "loss": "loss",
    "gamma": "Γ",
    "snr": "SNR",
    "energy": "E",
}


def summary(seen):
    """One line for the progress bar, of the last values in the log: the mean of one a layer."""
    values = ((name, seen[key]) for key, name in SHOWN.items() if key in seen)
    means = ((name, sum(x) / len(x) if isinstance(x, list) else x) for name, x in values)
    return ", ".join(f"{name} {x:.3g}" for name, x in means)


def progress_bar(run, visible):
    """A tqdm bar over the steps of a run, in one process of several."""
    hidden = not (visible and run.accelerator.is_main_process)
    options = {"unit": "step", "disable": hidden, "mininterval": 0.5}
    return need("tqdm").tqdm(total=run.settings.steps, initial=run.step, **options)


# %% notebooks/08_training.ipynb#loop
def where_saved(run):
    """Where a run is, in words."""
    return f"saved in {run.folder}" if run.folder else "not saved"


def run_steps(run, interruption, progress=True, on_step=None):
    """Train until the last step, until patience ends, or until asked to stop."""
    settings, seen = run.settings, {}
    with progress_bar(run, progress) as bar:
        while run.step < settings.steps and not out_of_patience(run):
            entry = train_step(run, stop=interruption.signal is not None)
            last = run.step == settings.steps
            if last or run.step % settings.evaluate_every == 0:
                entry |= evaluate_run(run)
                last = last or out_of_patience(run)
            record(run, entry)
            seen |= entry  # what is not looked at in every step keeps its last value
            bar.set_postfix_str(summary(seen), refresh=False)
            bar.update()
            if on_step:
                on_step(entry)
            if run.folder and (last or run.stopping or run.step % settings.save_every == 0):
                save_run(run)
            if run.stopping and not last:
                interruption.leave(f"stopped after step {run.step}, {where_saved(run)}")


# %% notebooks/08_training.ipynb#train
def train(
    model,
    data,
    settings=None,
    *,
    out=None,
    resume=False,
    accelerator=None,
    on_step=None,
    progress=True,
    **values,
):
    """Train a model on text; it ends with the weights of the best evaluation (none is at step 0).

    Args:
        model: Phase2IntegratedModel; moves to the accelerator's device, gets `data.tokenizer`.
        data: TextData, from :func:`text_data`.
        settings: TrainSettings; or its fields by name, in `values`.
        out: folder for `training.pt`, `history.jsonl` and `tokenizer.json`, or None.
        resume: go on with the run in `out`, if there is one; but for `FREE` its settings stay.
        accelerator: accelerate.Accelerator, to choose a device or bf16; None makes one, of CUDA if
            there is any, else of the CPU, and of the precision of one made before in this process.
        on_step, progress: function called with each entry of the history; show a bar?

    Returns:
        The history, a dict a step: see :func:`train_step`, :func:`evaluate_run`.

    Raises:
        TypeError, ValueError: see :func:`check_model`, :func:`check_run` and
            :func:`~phase2.model.one_or_fields`.
        FileExistsError, CheckpointError: see :func:`begin`, :func:`resume_run`.
        FloatingPointError: the loss is not finite.
        KeyboardInterrupt, SystemExit: after Ctrl-C, or SIGTERM or SIGHUP, once the run is saved.
    """
    accelerator = as_accelerator(accelerator)
    folder = Path(out) if out else None
    settings = one_or_fields(TrainSettings, "settings", settings, values)
    run = prepare(model, data, settings, accelerator, folder)
    run_to_the_end(run, resume, progress, on_step)
    return run.history


# %% notebooks/08_training.ipynb#finish
def unwrap(run):
    """Leave the model plain: it computes in its own precision again, and can be pickled."""
    options = {"keep_fp32_wrapper": False, "keep_torch_compile": False}
    model = run.accelerator.unwrap_model(run.model, **options)
    forward = vars(model).get("forward")
    while hasattr(forward, "__func__"):  # a method, or one of a method if the model is compiled
        forward = forward.__func__
    if forward is type(model).forward:  # of Accelerate, in the place of the method
        del model.forward


def finish(run):
    """Leave the model with its best weights, ready to be used."""
    model = run.plain_model
    if run.best:
        model.load_state_dict(run.best["weights"])
    model.eval()


def run_to_the_end(run, resume, progress, on_step):
    """:func:`begin` and :func:`run_steps`; the model is plain after it, whatever has happened."""
    with Interruption() as interruption, repeatable(run.accelerator.device):
        try:
            begin(run, resume)
            run.plain_model.tokenizer = run.data.tokenizer
            run_steps(run, interruption, progress, on_step)
        finally:
            unwrap(run)
    finish(run)
    if interruption.signal is not None:  # it came in the last step
        interruption.leave(f"stopped after step {run.step}, the last one, {where_saved(run)}")
