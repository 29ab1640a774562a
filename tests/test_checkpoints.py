"""Checkpoints: what is saved comes back, and nothing but a model gets in."""

import contextlib
import copy
import json
import os
import pickle
import random
import shutil
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase2.model import create_phase2_model, empty_state
from phase2.resonance import resonance_basis
from phase2.training import ByteTokenizer, CheckpointError, text_data, train

pytest.importorskip("huggingface_hub")
pytest.importorskip("safetensors")

from phase2.checkpoints import (  # noqa: E402
    Phase2HubModel,
    digest,
    from_pretrained,
    load_state,
    read_weights,
    save_pretrained,
    save_state,
    to_hub,
    write_weights,
)

TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_seq": 24, "vocab_size": 300}
TEXT = "".join(f"{n} squared is {n * n}; " for n in range(300))


class Harm:
    """Reading this pickle would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo harm > {self.path}",)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create_phase2_model(**TINY)


@pytest.fixture(scope="module")
def pairs():
    pytest.importorskip("tokenizers")
    return text_data(TEXT, tokenizer="bpe", vocab_size=300).tokenizer


@pytest.fixture
def folder(model, pairs, tmp_path):
    save_pretrained(model, tmp_path / "model", pairs)
    return tmp_path / "model"


def refused(name, *words):
    with pytest.raises(CheckpointError) as error:
        from_pretrained(name)
    assert str(error.value).startswith(str(name))
    for word in words:
        assert word in str(error.value), error.value


# There and back


def test_what_is_saved_comes_back(model, pairs, folder):
    random_state = torch.get_rng_state()
    loaded = from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(loaded, Phase2HubModel) and not loaded.training
    assert loaded.config == model.config
    assert digest(loaded.state_dict()) == digest(model.state_dict())
    ids = pairs.encode(TEXT)[None, :50].long()
    assert torch.equal(loaded(ids), model(ids))
    assert torch.equal(loaded.tokenizer.encode(TEXT), pairs.encode(TEXT))
    assert sorted(os.listdir(folder)) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_saving_again_replaces_the_model_and_keeps_a_readme(folder):
    (folder / "README.md").write_text("mine")
    other = create_phase2_model(d_model=8, n_layers=1, n_heads=1)
    save_pretrained(other, folder)
    loaded = from_pretrained(folder)
    assert loaded.config == other.config and loaded.tokenizer.vocab_size == 256
    assert (folder / "README.md").read_text(encoding="utf-8") == "mine"
    assert not (folder / "tokenizer.json").exists()


def test_a_loaded_model_saves_and_trains_like_any_other(folder, tmp_path):
    loaded = from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = Phase2HubModel.from_pretrained(tmp_path / "again")
    assert digest(again.state_dict()) == digest(loaded.state_dict())
    assert again.tokenizer.vocab_size == 300
    data = text_data(TEXT, tokenizer=again.tokenizer)
    before = digest(again.state_dict())
    train(again, data, steps=2, batch_size=2, progress=False)
    assert digest(again.state_dict()) != before


def test_a_hub_model_shares_the_weights(model):
    hub = to_hub(model)
    assert hub.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert hub.training == model.training


def test_a_compiled_model_is_saved(model, tmp_path):
    save_pretrained(torch.compile(model), tmp_path)
    assert digest(from_pretrained(tmp_path).state_dict()) == digest(model.state_dict())


def test_a_tokenizer_that_cannot_be_saved_is_refused(model, pairs, tmp_path):
    with pytest.raises(TypeError, match="str lacks"):
        save_pretrained(model, tmp_path, tokenizer="bpe")
    small = create_phase2_model(d_model=8, n_layers=1, n_heads=1)
    with pytest.raises(ValueError, match="300 tokens, the model knows 256"):
        save_pretrained(small, tmp_path, tokenizer=pairs)
    assert not list(tmp_path.iterdir())
    save_pretrained(model, tmp_path, tokenizer=pairs.tokenizer)
    assert from_pretrained(tmp_path).tokenizer.vocab_size == 300


def test_weights_alone_say_what_is_missing(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", "has no 'config'", "weights alone do not say of which model")
    (tmp_path / "other.safetensors").write_bytes(b"")
    refused(tmp_path / "other.safetensors", "give the folder")
    (tmp_path / "text.txt").write_text("no checkpoint")
    refused(tmp_path / "text.txt", "is no checkpoint of tensors")


def test_the_model_card_says_how_to_load_it(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: phase2" in card and "from_pretrained(" in card
    assert "More Information Needed" not in card


def test_half_precision_is_stored_as_such_and_read_as_float32(pairs, tmp_path):
    torch.manual_seed(0)
    half = create_phase2_model(**TINY).bfloat16()
    save_pretrained(half, tmp_path, pairs)
    assert read_weights(tmp_path / "model.safetensors")["head.weight"].dtype == torch.bfloat16
    assert from_pretrained(tmp_path).head.weight.dtype == torch.float32


def test_the_form_of_torch_save(model, tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"model_state_dict": model.state_dict(), "config": model.config.to_dict()}
    torch.save(state | {"train_loss": 1.5}, path)
    for name in (path, str(path)):
        assert digest(from_pretrained(name).state_dict()) == digest(model.state_dict())
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert digest(from_pretrained(path).state_dict()) == digest(model.state_dict())


def test_a_run_that_is_not_finished_loads_its_best_weights(tmp_path):
    class Killed(Exception):
        pass

    def kill(entry):
        if entry["step"] == 7:
            raise Killed

    data = text_data(TEXT, tokenizer="bpe", vocab_size=300)
    choice = {"steps": 20, "evaluate_every": 3, "save_every": 3, "progress": False, "batch_size": 2}
    with pytest.raises(Killed):
        train(create_phase2_model(**TINY), data, **choice, out=tmp_path, on_step=kill)
    loaded = from_pretrained(tmp_path)
    best = torch.load(tmp_path / "training.pt")["best"]["weights"]
    assert digest(loaded.state_dict()) == digest(best)
    assert loaded.tokenizer.vocab_size == 300


# The Hub


class FakeHub:
    """The two calls of the Hub's client that the mixin makes when it pushes."""

    def __init__(self, store, token=None):
        self.store = store

    def create_repo(self, repo_id, **_):
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path, **_):
        shutil.copytree(folder_path, self.store / repo_id)
        return f"https://hub/{repo_id}"


def test_pushing_and_pulling(model, pairs, tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "store")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda **_: hub)
    asked = []

    def snapshot_download(repo_id, allow_patterns, revision=None):
        asked.append((repo_id, revision))
        return str(hub.store / repo_id)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert to_hub(model, pairs).push_to_hub("me/squares") == "https://hub/me/squares"
    loaded = from_pretrained("me/squares", revision="main")
    assert asked == [("me/squares", "main")]
    assert digest(loaded.state_dict()) == digest(model.state_dict())
    assert loaded.tokenizer.vocab_size == 300
    url = save_pretrained(model, tmp_path / "local", push_to_hub=True, repo_id="me/two")
    assert url == "https://hub/me/two"


def test_an_option_that_is_none_is_refused(folder):
    with pytest.raises(TypeError, match="unknown option 'device'"):
        from_pretrained(folder, device="cuda")


def test_the_file_of_the_weights_stands_for_its_folder(model, pairs, tmp_path):
    save_pretrained(model, tmp_path, pairs)
    loaded = from_pretrained(tmp_path / "model.safetensors")
    assert digest(loaded.state_dict()) == digest(model.state_dict())
    assert loaded.tokenizer.vocab_size == 300


def test_a_lost_tokenizer_is_missed(model, pairs, tmp_path):
    save_pretrained(model, tmp_path, pairs)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="tokenizer.json: no such file; text is read as bytes"):
        from_pretrained(tmp_path)


def test_what_is_nowhere_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("nowhere", "no such file or folder")
    refused(str(tmp_path / "nowhere"), "no such file or folder")
    with pytest.raises(CheckpointError, match="^me/nothing: not here, and not from the Hub"):
        from_pretrained("me/nothing", local_files_only=True)
    refused(tmp_path, "holds neither model.safetensors nor training.pt")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(folder, monkeypatch, name):
    monkeypatch.setattr("os.access", lambda path, mode: os.path.basename(path) != name)
    refused(folder, f"{name}: may not be read")


# Damage


def change(path, edit):
    path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_weights_cut_short(folder, share):
    change(folder / "model.safetensors", lambda raw: raw[: int(share * len(raw))])
    refused(folder, "model.safetensors", "cut short")


@settings(max_examples=40)
@given(data=st.data())
def test_any_flipped_bit_in_the_weights_is_found(model, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    write_weights(path, model.state_dict())
    raw = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[place // 8] ^= 1 << place % 8
    path.write_bytes(raw)
    try:
        found = read_weights(path)
    except CheckpointError as error:
        assert str(path) in str(error)
    else:  # the bit was of the header's own words: names of keys it does not need, or its checksum
        header = 8 + struct.unpack("<Q", bytes(raw[:8]))[0]
        assert place // 8 < header
        assert digest(found) == digest(model.state_dict())


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda c: c | {"d_model": 32}, ["model.safetensors", "shape (300, 16)", "(300, 32)"]),
        (lambda c: c | {"n_layers": 3}, ["model.safetensors", "weights of 2 layers", "asks for 3"]),
        (lambda c: c | {"n_layers": 1}, ["model.safetensors", "weights of 2 layers", "asks for 1"]),
        (
            lambda c: c | {"d_model": 2**40, "resonance_basis": "fourier"},
            ["model.safetensors", "asks for (300, 1099511627776)"],
        ),
        (lambda c: c | {"n_layers": 10**9}, ["model.safetensors", "asks for 1000000000"]),
        (lambda c: c | {"hebian_eta": 1}, ["config.json", "'hebian_eta'", "'hebbian_eta'"]),
        (lambda c: c | {"dt": "fast"}, ["config.json", "dt must be a number"]),
        (lambda c: c | {"vocab_size": 270}, ["tokenizer.json", "300 tokens", "270"]),
        (lambda c: [c], ["config.json", "must be a dict, got list"]),
        (lambda c: None, ["config.json", "must be a dict, got NoneType"]),
    ],
)
def test_files_that_do_not_fit(folder, edit, words):
    path = folder / "config.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    refused(folder, *words)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"not json", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_json_that_is_none(folder, name, raw):
    (folder / name).write_bytes(raw)
    refused(folder, name)


def test_a_missing_configuration(folder):
    (folder / "config.json").unlink()
    refused(folder, "config.json")


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda s: {"config": s["config"]}, "has no 'model_state_dict'"),
        (lambda s: {"model_state_dict": s["model_state_dict"]}, "has no 'config'"),
        (lambda s: [1, 2], "has no 'config'"),
        (lambda s: s | {"model_state_dict": 3}, "must be a dict, got int"),
        (lambda s: s | {"model_state_dict": {"head.weight": 3}}, "lacks embedding.weight"),
        (lambda s: s | {"config": {"n_heads": 0}}, "n_heads must be"),
        (lambda s: s | {"best": {"weights": None}}, "must be a dict, got NoneType"),
    ],
)
def test_torch_files_that_do_not_fit(model, tmp_path, edit, words):
    path = tmp_path / "checkpoint.pt"
    state = {"model_state_dict": model.state_dict(), "config": model.config.to_dict()}
    torch.save(edit(state), path)
    refused(path, words)


def test_integers_for_weights(model, tmp_path):
    state = {name: weight.int() for name, weight in model.state_dict().items()}
    path = tmp_path / "checkpoint.pt"
    torch.save({"model_state_dict": state, "config": model.config.to_dict()}, path)
    refused(path, "must be a tensor of floats")


def test_random_damage_to_a_torch_file_is_found(model, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model_state_dict": model.state_dict(), "config": model.config.to_dict()}, path)
    raw, chance = path.read_bytes(), random.Random(0)
    reference = digest(model.state_dict())
    for _ in range(60):
        place, damaged = chance.randrange(len(raw)), bytearray(raw)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = from_pretrained(path)
        except CheckpointError as error:
            assert str(error).startswith(str(path))
        else:  # a time, a name or padding, which nothing depends on
            assert digest(loaded.state_dict()) == reference, place


# Harm


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle 2", "pickle 5"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "training.pt"])
def test_a_harmful_file_is_refused_and_nothing_of_it_runs(model, tmp_path, kind, name):
    path, proof = tmp_path / name, tmp_path / "proof"
    state = {"model_state_dict": model.state_dict(), "config": model.config.to_dict()}
    state["extra"] = Harm(proof)
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(Harm(proof), protocol=int(kind[-1])))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match="refused, nothing in it was run$"):
        from_pretrained(path)
    if name == "training.pt":
        with pytest.raises(CheckpointError, match="nothing in it was run"):
            train(create_phase2_model(**TINY), text_data(TEXT), out=tmp_path, resume=True)
    assert not proof.exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle runs, and then is no checkpoint
        torch.load(path, weights_only=False)
    assert proof.exists()  # it would have worked


def test_a_pickle_that_calls_itself_safetensors(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Harm(tmp_path / "proof")))
    refused(folder, "model.safetensors")
    assert not (tmp_path / "proof").exists()


# Saves that fail


@pytest.mark.parametrize(
    "victim", ["os.fsync", "safetensors.torch.save", "huggingface_hub.ModelCard.save"]
)
def test_a_save_that_fails_leaves_the_old_model(folder, monkeypatch, victim):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(victim, full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(create_phase2_model(d_model=8, n_layers=1, n_heads=1), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_push_that_fails_leaves_the_new_model(folder, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.PyTorchModelHubMixin.push_to_hub", offline)
    model = create_phase2_model(d_model=8, n_layers=1, n_heads=1)
    with pytest.raises(ConnectionError):
        save_pretrained(model, folder, push_to_hub=True)
    assert from_pretrained(folder).config == model.config


def test_the_configuration_of_a_saved_model_is_its_own(tmp_path):
    model = create_phase2_model(d_model=8, n_layers=1, n_heads=1)
    to_hub(model).save_pretrained(tmp_path, config={"d_model": 16})  # an option of the mixin
    assert from_pretrained(tmp_path).config == model.config


def test_a_model_may_know_fewer_tokens_than_there_are_bytes(tmp_path):
    model = create_phase2_model(d_model=8, n_layers=1, n_heads=1, vocab_size=100)
    save_pretrained(model, tmp_path, ByteTokenizer())
    assert isinstance(from_pretrained(tmp_path).tokenizer, ByteTokenizer)


def test_a_model_keeps_no_tokenizer_that_is_too_large(tmp_path):
    pairs = text_data("the quick brown fox jumps over it " * 9, "bpe", 280).tokenizer
    hub = to_hub(create_phase2_model(d_model=8, n_layers=1, n_heads=1), pairs)  # of 256 tokens
    with pytest.raises(ValueError, match="the model knows 256"):
        hub.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_state_is_kept_for_a_model_alone(tmp_path):
    model = create_phase2_model(d_model=8, n_layers=1, n_heads=1)
    with pytest.raises(TypeError, match="got DataParallel"):
        save_state(tmp_path / "s", empty_state(model.config, 1), torch.nn.DataParallel(model))


# What a model has read


def test_a_state_comes_back_for_its_model_and_no_other(model, tmp_path):
    path, ids = tmp_path / "read.safetensors", torch.randint(0, 300, (2, 70))
    with torch.no_grad():
        for state in (empty_state(model.config, 2), model(ids, return_state=True)[1]):
            save_state(path, state, torch.compile(model))
            found = load_state(path, model)
            assert found.position == state.position
            for ours, theirs in zip(found.layers, state.layers, strict=True):
                assert all(map(torch.equal, ours, theirs))
            assert torch.equal(model(ids, found), model(ids, state))
    other = create_phase2_model(config=model.config)
    quicker = create_phase2_model(config=replace(model.config, dt=0.5))
    quicker.load_state_dict(model.state_dict())
    for stranger in (other, quicker):
        with pytest.raises(CheckpointError, match="read.safetensors: not of this model"):
            load_state(path, stranger)
    save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match="model.safetensors: not of this model"):
        load_state(tmp_path / "model.safetensors", model)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_state(path, model)


def test_a_state_of_a_model_in_half_precision_comes_back(tmp_path):
    half = create_phase2_model(**TINY).bfloat16()
    with torch.no_grad():
        _, state = half(torch.randint(0, 300, (1, 20)), return_state=True)
    save_pretrained(half, tmp_path / "half", tokenizer=ByteTokenizer())
    save_state(tmp_path / "state", state, half)
    with pytest.warns(UserWarning, match="text is read as bytes"):
        loaded = from_pretrained(tmp_path / "half")
    assert load_state(tmp_path / "state", loaded).position == state.position
    with pytest.raises(ValueError, match="state must be of"):
        save_state(tmp_path / "state", state, create_phase2_model(**TINY | {"n_layers": 1}))


def test_a_typing_error_in_an_option_of_saving(model, pairs, tmp_path):
    with pytest.raises(TypeError, match="unknown option 'tokeniser'"):
        save_pretrained(model, tmp_path / "model", tokeniser=pairs)
    assert not (tmp_path / "model").exists()


def test_a_copied_checkpoint_of_byte_pairs_finds_its_tokenizer(pairs, tmp_path):
    data = text_data(TEXT, pairs)
    train(create_phase2_model(**TINY), data, steps=1, out=tmp_path, progress=False)
    shutil.copy(tmp_path / "training.pt", tmp_path / "best.pt")
    assert from_pretrained(tmp_path / "best.pt").tokenizer.vocab_size == 300


def test_the_tokenizer_of_the_model_itself_is_saved(tmp_path):
    data = text_data("some text, " * 50, "bpe", vocab_size=270, held_out=0)
    model = create_phase2_model(d_model=16, n_layers=1, n_heads=1, vocab_size=270)
    model.tokenizer = data.tokenizer.tokenizer  # as the library has it
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path).tokenizer.vocab_size == data.tokenizer.vocab_size
    small = create_phase2_model(d_model=16, n_layers=1, n_heads=1)
    small.tokenizer = data.tokenizer
    with pytest.raises(ValueError, match="tokens, the model knows 256"):
        save_pretrained(small, tmp_path / "small")


def test_a_run_that_was_not_evaluated_keeps_its_tokenizer(tmp_path):
    library = pytest.importorskip("tokenizers")
    few = library.Tokenizer(library.models.WordLevel({"a": 0, "b": 1, "</s>": 2}, "</s>"))
    few.pre_tokenizer = library.pre_tokenizers.Whitespace()
    data = text_data("a b " * 200, few, held_out=0)
    model = create_phase2_model(d_model=16, n_layers=1, n_heads=1, vocab_size=3, n_seq=16)
    train(model, data, steps=2, batch_size=2, warmup=1, out=tmp_path, progress=False)
    assert torch.load(tmp_path / "training.pt")["best"] is None
    assert from_pretrained(tmp_path).tokenizer.vocab_size == 3


def test_bases_are_exact_wherever_a_model_comes_from():
    exact = resonance_basis("zeta", 16, torch.float64)
    model = create_phase2_model(d_model=16, n_layers=1, n_heads=1)
    assert torch.equal(copy.deepcopy(model).double().blocks[0].basis, exact)
    with torch.device("meta"):
        empty = create_phase2_model(d_model=16, n_layers=1, n_heads=1)
    empty.load_state_dict(model.state_dict(), assign=True)
    ids = torch.randint(0, 256, (2, 600))
    assert torch.equal(empty(ids), model(ids))


def test_tied_weights_are_saved_as_two(tmp_path):
    model = create_phase2_model(d_model=16, n_layers=1, n_heads=1)
    model.head.weight = model.embedding.weight
    save_pretrained(model, tmp_path)
    ids = torch.randint(0, 256, (1, 20))
    assert torch.equal(from_pretrained(tmp_path)(ids), model.eval()(ids))


def test_weights_that_the_configuration_does_not_know(tmp_path):
    model = create_phase2_model(d_model=16, n_layers=1, n_heads=1)
    model.blocks[0].qkv = torch.nn.Sequential(model.blocks[0].qkv)  # as an adapter does
    with pytest.raises(ValueError, match="other weights than its configuration: blocks.0.qkv"):
        save_pretrained(model, tmp_path)


def test_what_is_around_a_model_is_not_saved(tmp_path):
    model = torch.nn.DataParallel(create_phase2_model(d_model=16, n_layers=1, n_heads=1))
    with pytest.raises(TypeError, match="must be a Phase2IntegratedModel, .* got DataParallel"):
        save_pretrained(model, tmp_path)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda x: x.to("meta")])
def test_weights_that_are_not_there_or_not_dense(model, tmp_path, change):
    weights = model.state_dict()
    weights["head.weight"] = change(weights["head.weight"])
    torch.save({"model_state_dict": weights, "config": model.config.to_dict()}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "head.weight must be dense")


def test_what_does_not_fit_takes_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(Phase2HubModel, "to_empty", None)  # would make the tensors
    config = TINY | {"d_model": 16_384, "vocab_size": 1, "resonance_basis": "identity"}
    weights = {"embedding.weight": torch.zeros(1, 16_384)}
    weights |= dict.fromkeys(["blocks.0.x", "blocks.1.x"], torch.zeros(1))
    torch.save({"model_state_dict": weights, "config": config}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "lacks blocks.0.key_mix")


def test_hints_of_what_to_save(model, tmp_path):
    compiled = {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()}
    torch.save({"model_state_dict": compiled, "config": model.config.to_dict()}, tmp_path / "x.pt")
    refused(
        tmp_path / "x.pt",
        "its first is _orig_mod.embedding.weight; of a compiled or wrapped model, save",
    )
    torch.save({"model_state_dict": {}, "config": model.config}, tmp_path / "y.pt")
    refused(tmp_path / "y.pt", "save config.to_dict")


def test_the_folder_one_is_in_has_a_name(model, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    pushed = []
    monkeypatch.setattr(
        Phase2HubModel, "push_to_hub", lambda self, repo_id, **_: pushed.append(repo_id)
    )
    save_pretrained(model, ".", push_to_hub=True)
    assert pushed == ["mine"]
