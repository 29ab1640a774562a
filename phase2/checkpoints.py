# Generated from notebooks/11_checkpoints.ipynb; edit the notebook, not this file.
"""Checkpoints."""

import hashlib
import inspect
import json
import os
import re
import tempfile
from pathlib import Path

import torch

from phase2.consolidation import MemoryState
from phase2.decay import warn_caller
from phase2.model import Phase2Config, Phase2IntegratedModel, Phase2State, check_state, uncompiled
from phase2.training import (
    CHECKPOINT,
    CONFIG,
    MODEL,
    TOKENIZER,
    BPETokenizer,
    ByteTokenizer,
    CheckpointError,
    as_tokenizer,
    check_file,
    check_weights,
    need,
    read_torch,
    save_tokenizer,
    write_atomically,
)

__all__ = [
    "digest",
    "check_size",
    "check_tokenizer",
    "parse_config",
    "read_config",
    "read_weights",
    "write_weights",
    "read_tokenizer",
    "read_file",
    "read_folder",
    "FILES",
    "locate",
    "CARD",
    "Phase2HubModel",
    "check_options",
    "put_in_place",
    "check_sizes",
    "load",
    "to_hub",
    "save_pretrained",
    "from_pretrained",
    "identity",
    "save_state",
    "load_state",
]


# %% notebooks/11_checkpoints.ipynb#digest
def digest(weights):
    """A name for the exact contents of a state dict: equation (eq-digest).

    Args:
        weights: dict of tensors, on any device.

    Returns:
        64 hexadecimal digits.
    """
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


# %% notebooks/11_checkpoints.ipynb#check-tokenizer
def check_size(tokenizer, config):
    """A tokenizer as this package has it; ValueError if it has more tokens than the model knows."""
    tokenizer = as_tokenizer(tokenizer)
    if isinstance(tokenizer, BPETokenizer) and tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, the model knows {config.vocab_size}"
        raise ValueError(f"tokenizer has {sizes}")
    return tokenizer


def check_tokenizer(tokenizer, config):
    """A tokenizer that can be saved with a model; TypeError or ValueError if it cannot."""
    tokenizer = check_size(tokenizer, config)
    if not isinstance(tokenizer, ByteTokenizer | BPETokenizer):
        kind = type(tokenizer).__name__
        raise TypeError(f"tokenizer must be of bytes or byte pairs to be saved, got {kind}")
    return tokenizer


# %% notebooks/11_checkpoints.ipynb#read-config
def parse_config(values, path):
    """A dict from a file -> Phase2Config.

    Raises:
        CheckpointError: it is no dict, or has an unknown key or a value that is not allowed.
    """
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path}: the configuration must be a dict, got {type(values).__name__}"
        )
    try:
        return Phase2Config.from_dict(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_config(path):
    """`config.json` -> Phase2Config.

    Raises:
        CheckpointError: no such file, no JSON, or see :func:`parse_config`.
    """
    check_file(path)
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{path}: no JSON ({reason})") from error
    return parse_config(values, path)


# %% notebooks/11_checkpoints.ipynb#read-weights
def read_weights(path, **labels):
    """`model.safetensors` -> dict of tensors, on the CPU.

    Args:
        path: the file.
        labels: what its header must hold, by name.

    Raises:
        CheckpointError: cut short, damaged, no such file, or another label.
    """
    check_file(path)
    safetensors = need("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cut short or damaged ({error})") from error
    written = header.get("sha256")
    if written and written != digest(weights):
        raise CheckpointError(f"{path}: damaged, its checksum is wrong")
    for name, label in labels.items():
        if header.get(name) != label:
            raise CheckpointError(f"{path}: not of this {name}")
    return weights


def write_weights(path, weights, **labels):
    """The inverse of :func:`read_weights`, with the checksum, atomically."""
    layout = {"copy": True, "memory_format": torch.contiguous_format}  # no two may share memory
    plain = {name: tensor.detach().to("cpu", **layout) for name, tensor in weights.items()}
    header = {"format": "pt", "sha256": digest(plain), **labels}
    raw = need("safetensors.torch").save(plain, header)
    write_atomically(path, lambda file: file.write(raw))


# %% notebooks/11_checkpoints.ipynb#read-tokenizer
def read_tokenizer(folder, config=None):
    """The tokenizer of a folder: that of `tokenizer.json`, or bytes if there is none.

    Bytes for a model that knows more tokens are a warning.

    Raises:
        CheckpointError: it cannot be read, or has more tokens than the Phase2Config allows.
    """
    path = Path(folder) / TOKENIZER
    if not path.exists():
        bytes_only = ByteTokenizer()
        if config and config.vocab_size > bytes_only.vocab_size:
            known = f"text is read as bytes, though the model knows {config.vocab_size} tokens"
            warn_caller(f"{path}: no such file; {known}", UserWarning)
        return bytes_only
    library = need("tokenizers")
    try:
        tokenizer = BPETokenizer(library.Tokenizer.from_str(path.read_text(encoding="utf-8")))
    except Exception as error:  # the library raises plain Exceptions
        raise CheckpointError(f"{path}: no tokenizer ({error})") from error
    try:
        return check_tokenizer(tokenizer, config) if config else tokenizer
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


# %% notebooks/11_checkpoints.ipynb#sources
def read_file(path):
    """A file of `torch.save` -> Phase2Config, weights, and the tokenizer.

    Raises:
        CheckpointError: see :func:`phase2.training.read_torch`; or an entry is missing.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: give the folder of {MODEL} and config.json")
    state = read_torch(path)
    for key in ("config", "model_state_dict"):
        if not isinstance(state, dict) or key not in state:
            why = "which a checkpoint needs: weights alone do not say of which model"
            raise CheckpointError(f"{path}: has no {key!r}, {why}")
    config, best = parse_config(state["config"], path), state.get("best")
    evaluated = isinstance(best, dict) and "weights" in best
    weights = best["weights"] if evaluated else state["model_state_dict"]
    # the tokenizer of a run is beside it; another file may have one, if bytes do not do
    bytes_only = "settings" not in state and config.vocab_size <= ByteTokenizer.vocab_size
    return config, weights, ByteTokenizer() if bytes_only else read_tokenizer(path.parent, config)


def read_folder(folder):
    """A folder -> Phase2Config, weights, the tokenizer, and the file that held the weights.

    Raises:
        CheckpointError: there is no model in it, or one of its files is damaged.
    """
    weights, run = Path(folder) / MODEL, Path(folder) / CHECKPOINT
    if weights.exists():
        config = read_config(Path(folder) / CONFIG)
        return config, read_weights(weights), read_tokenizer(folder, config), weights
    if run.exists():
        return *read_file(run), run
    raise CheckpointError(f"{folder}: holds neither {weights.name} nor {run.name}")


# %% notebooks/11_checkpoints.ipynb#locate
FILES = [CONFIG, MODEL, TOKENIZER]


def locate(name, **download):
    """The path of a checkpoint: `name` itself, or where the Hub's repository was downloaded to.

    Args:
        name: a file, a folder, or the name of a repository, owner/model.
        download: options of `huggingface_hub.snapshot_download`, such as `revision` and `token`.

    Raises:
        CheckpointError: it is none of these, or cannot be downloaded.
        TypeError: there is no such option.
    """
    get = need("huggingface_hub").snapshot_download
    if unknown := download.keys() - inspect.signature(get).parameters:
        known = "a download takes revision, token, …; to move a model, model.to(…)"
        raise TypeError(f"unknown option {min(unknown)!r}; {known}")
    path = Path(name)
    if path.exists():
        return path.parent if path.name == MODEL else path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise CheckpointError(f"{name}: no such file or folder")
    try:
        return Path(get(str(name), allow_patterns=FILES, **download))
    except Exception as error:  # of the network, of the Hub, of the name
        why = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{name}: not here, and not from the Hub ({why})") from error


# %% notebooks/11_checkpoints.ipynb#card
CARD = """---
{{ card_data }}
---

A language model whose memory is written by association, and forgets. It is loaded with

```python
from phase2.checkpoints import from_pretrained

model = from_pretrained("FOLDER or OWNER/MODEL")
```

and `phase2 generate FOLDER --prompt "..."` writes with it.
"""
_Mixin = need("huggingface_hub").PyTorchModelHubMixin


# %% notebooks/11_checkpoints.ipynb#hub
class Phase2HubModel(
    Phase2IntegratedModel, _Mixin, library_name="phase2", model_card_template=CARD
):
    """A model, and its `tokenizer`, that can be saved, loaded, pushed to the Hub and pulled."""

    def __init__(self, config, tokenizer=None):
        super().__init__(config)
        self.tokenizer = tokenizer or ByteTokenizer()

    def save_pretrained(self, save_directory, **options):
        """See :func:`save_pretrained`."""
        check_options(options)
        self.tokenizer = check_size(self.tokenizer, self.config)
        (folder := Path(save_directory)).mkdir(parents=True, exist_ok=True)
        options.setdefault("repo_id", folder.resolve().name)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as fresh:
            try:
                return super().save_pretrained(fresh, **options)
            finally:
                if (Path(fresh) / "README.md").exists():  # the last: only a push can have failed
                    put_in_place(Path(fresh), folder)

    def _save_pretrained(self, save_directory):
        config = json.dumps(self.config.to_dict(), indent=2)
        write_atomically(save_directory / CONFIG, lambda file: file.write(config.encode()))
        save_tokenizer(self.tokenizer, save_directory)
        write_weights(save_directory / MODEL, self.state_dict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **download):
        """See :func:`from_pretrained`."""
        return load(cls, locate(pretrained_model_name_or_path, **download))


# %% notebooks/11_checkpoints.ipynb#put-in-place
def check_options(options):
    """Refuse, with a TypeError, an option that neither saving nor pushing has."""
    methods = _Mixin.save_pretrained, _Mixin.push_to_hub
    known = {name for method in methods for name in inspect.signature(method).parameters}
    if unknown := options.keys() - known:
        raise TypeError(f"unknown option {min(unknown)!r}")


def put_in_place(fresh, folder):
    """Move the files of a finished save to where they belong; a README already there stays."""
    names = sorted(file.name for file in fresh.iterdir())
    for name in names:
        if name != "README.md" or not (folder / name).exists():
            os.replace(fresh / name, folder / name)
    if TOKENIZER not in names:  # of an earlier model, whose tokens were no bytes
        (folder / TOKENIZER).unlink(missing_ok=True)


# %% notebooks/11_checkpoints.ipynb#load
def check_sizes(config, weights, path):
    """Refuse, with a CheckpointError, weights of other sizes than a configuration asks for.

    Before a model is made, which might be one that no machine can hold.
    """
    if not isinstance(weights, dict):
        raise CheckpointError(f"{path}: weights must be a dict, got {type(weights).__name__}")
    if "embedding.weight" not in weights:
        first = next(iter(weights), None)
        why = f"its first is {first}; of a compiled or wrapped model, save the model inside"
        raise CheckpointError(f"{path}: lacks embedding.weight, {why}")
    layers = {name.split(".")[1] for name in map(str, weights) if name.startswith("blocks.")}
    if len(layers) != config.n_layers:
        why = f"its configuration asks for {config.n_layers}"
        raise CheckpointError(f"{path}: holds the weights of {len(layers)} layers, {why}")
    shape = tuple(getattr(weights["embedding.weight"], "shape", ()))
    if shape != (config.vocab_size, config.d_model):
        why = f"its configuration asks for {(config.vocab_size, config.d_model)}"
        raise CheckpointError(f"{path}: embedding.weight has shape {shape}, {why}")


def load(cls, path):
    """A model of class `cls` from a file or folder, in evaluation mode, on the CPU."""
    if path.is_file():
        config, weights, tokenizer, source = *read_file(path), path
    else:
        config, weights, tokenizer, source = read_folder(path)
    check_sizes(config, weights, source)
    with torch.device("meta"):  # takes no room, and draws no numbers, before the weights fit
        model = cls(config, tokenizer)
    check_weights(model, weights, source)
    model.to_empty(device="cpu").load_state_dict(weights)
    return model.eval()


# %% notebooks/11_checkpoints.ipynb#api
def to_hub(model, tokenizer=None):
    """A Phase2HubModel that shares the weights of a Phase2IntegratedModel, compiled or not."""
    model = uncompiled(model)
    with torch.device("meta"):  # its own weights are not needed
        hub = Phase2HubModel(model.config, tokenizer or getattr(model, "tokenizer", None))
    weights = model.state_dict()
    if other := min(weights.keys() ^ hub.state_dict().keys(), default=None):
        raise ValueError(f"model has other weights than its configuration: {other}; merge adapters")
    hub.load_state_dict(weights, assign=True)
    return hub.train(model.training)


# %% notebooks/11_checkpoints.ipynb#save-pretrained
def save_pretrained(model, folder, tokenizer=None, **options):
    """Save a model for :func:`from_pretrained`.

    Everything is written beside the folder's files first; what fails there leaves those alone.

    Args:
        model: Phase2IntegratedModel.
        folder: where `config.json`, `model.safetensors`, `tokenizer.json` and a model card go.
        tokenizer: ByteTokenizer, BPETokenizer or `tokenizers.Tokenizer`; None takes that of the
            model, or bytes.
        options: of the Hub's mixin: `push_to_hub`, `repo_id`, `private`, …

    Returns:
        None, or what the mixin says of the repository it pushed to.

    Raises:
        TypeError: another model or tokenizer, which cannot be saved; or no such option.
        ValueError: the tokenizer has more tokens than the model knows, or the model other weights
            than its configuration.
    """
    own = getattr(uncompiled(model), "tokenizer", None)
    if tokenizer is not None and tokenizer is not own:  # one's own is kept by oneself
        tokenizer = check_tokenizer(tokenizer, model.config)
    return to_hub(model, tokenizer).save_pretrained(folder, **options)


# %% notebooks/11_checkpoints.ipynb#from-pretrained
def from_pretrained(name, **download):
    """Load a model, in float32 on the CPU and ready for inference.

    Args:
        name: a folder of :func:`save_pretrained`; the folder of a training run, for its best
            weights; a file of `torch.save` with `model_state_dict` and `config`; or a repository
            of the Hub, "owner/model".
        download: options of `huggingface_hub.snapshot_download`.

    Returns:
        Phase2HubModel, with its `tokenizer`.

    Raises:
        CheckpointError: it is none of these, cut short, damaged, does not fit its configuration,
            or holds anything but tensors and plain values. Nothing in the file is run.
    """
    return Phase2HubModel.from_pretrained(name, **download)


# %% notebooks/11_checkpoints.ipynb#state
def identity(model):
    """A name for the weights of a model and its configuration, which its states belong to."""
    model = uncompiled(model)
    config = json.dumps(model.config.to_dict(), sort_keys=True)
    weights = {name: weight.float() for name, weight in model.state_dict().items()}  # as loaded
    return hashlib.sha256(f"{digest(weights)}{config}".encode()).hexdigest()


def save_state(path, state, model):
    """Keep what a model has read, in a file of safetensors, atomically.

    Args:
        path: the file.
        state: Phase2State.
        model: Phase2IntegratedModel that has read it.

    Raises:
        TypeError: `state` is no Phase2State, or another model.
        ValueError: the state is of a model of another size.
    """
    model = uncompiled(model)
    check_state(state, len(getattr(state, "position", ())), model.config)
    tensors = {"position": state.positions()}
    for i, layer in enumerate(state.layers):
        tensors |= {f"{i}.{name}": x for name, x in layer._asdict().items()}
    write_weights(path, tensors, model=identity(model))


# %% notebooks/11_checkpoints.ipynb#load-state
def load_state(path, model):
    """What :func:`save_state` has kept, on the device of the model.

    Raises:
        CheckpointError: cut short, damaged, no such file, or of another model.
    """
    model = uncompiled(model)
    tensors = read_weights(path, model=identity(model))
    device, layers = model.embedding.weight.device, range(model.config.n_layers)
    memories = (
        MemoryState(*(tensors[f"{i}.{name}"].to(device) for name in MemoryState._fields))
        for i in layers
    )
    return Phase2State(tuple(memories), tuple(tensors["position"].tolist()))
