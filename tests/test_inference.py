"""Generation equals recomputing the prefix, in any batch; scores do not depend on the pieces."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from phase2.inference import (
    BYTES,
    choose_token,
    evaluate,
    generate,
    generate_text,
    interact,
    pad_left,
    stream,
    stream_text,
    surprisals,
)
from phase2.model import create_phase2_model
from phase2.training import ByteTokenizer, text_data


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_phase2_model(d_model=32, n_layers=2, n_heads=2, consolidate_every=16)
    with torch.no_grad():
        model.head.weight.mul_(20)  # an untrained head hardly prefers any token
    return model


def prompts(*shape):
    return torch.randint(0, 256, shape)


@torch.no_grad()
def recompute(model, ids, steps, choose):
    for _ in range(steps):
        ids = torch.cat((ids, choose(model(ids)[:, -1])[:, None]), dim=1)
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.3},
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
def test_generate_equals_recomputing_the_prefix(model, options):
    ids = prompts(3, 10)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    found = generate(model, ids, 60, generator=generators[0], **options)
    slow = recompute(model, ids, 60, lambda z: choose_token(z, generator=generators[1], **options))
    assert torch.equal(found, slow)
    assert torch.equal(found[:, :10], ids)


def test_a_compiled_model_writes_the_same_text(model):
    """With two consolidations on the way."""
    ids, compiled = prompts(1, 10), copy.deepcopy(model)
    compiled.compile(backend="aot_eager")
    assert torch.equal(generate(compiled, ids, 30), generate(model, ids, 30))


def test_the_global_random_state_is_used_as_topk_and_multinomial_use_it():
    logits = torch.randn(5, 50)
    torch.manual_seed(3)
    ours = choose_token(logits, temperature=0.7, top_k=9)
    torch.manual_seed(3)
    largest, tokens = torch.topk(logits / 0.7, 9, dim=-1)
    place = torch.multinomial(F.softmax(largest, dim=-1), num_samples=1)
    assert torch.equal(ours, tokens.gather(1, place).squeeze(1))


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-9])
def test_no_temperature_is_too_small(temperature):
    logits = torch.tensor([[1.0, 30.0, 2.0], [-5.0, -9.0, -7.0]])
    assert choose_token(logits, temperature).tolist() == [1, 0]


def test_prompts_of_different_lengths_are_continued_as_if_alone(model):
    lengths = [1, 5, 16, 17, 40]
    ids = [prompts(n) for n in lengths]
    input_ids, mask = pad_left([x.tolist() for x in ids])
    assert mask.sum(1).tolist() == lengths
    assert all(torch.equal(row[m.bool()], x) for row, m, x in zip(input_ids, mask, ids))
    together = generate(model, input_ids, 50, attention_mask=mask)
    for row, prompt in zip(together, ids):
        assert torch.equal(row[-50:], generate(model, prompt[None], 50)[0, -50:])


def test_a_stream_is_lazy_endless_and_resumable(model):
    ids = prompts(2, 8)
    endless = stream(model, ids)
    first = torch.stack(list(itertools.islice(endless, 30)), dim=1)
    assert torch.equal(first, generate(model, ids, 30)[:, 8:])

    def tokens():
        states.append((yield from stream(model, ids, 20)))

    states = []
    part = torch.stack(list(tokens()), dim=1)
    assert states[0].position == (28, 28)  # prompt and all tokens have been read
    rest = model(torch.cat((ids, part), dim=1))[:, -1].argmax(-1)
    assert torch.equal(rest, first[:, 20])


def test_state_goes_on_where_it_was(model):
    ids = prompts(1, 30)
    with torch.no_grad():
        _, state = model(ids[:, :20], return_state=True)
    assert torch.equal(
        generate(model, ids[:, 20:], 10, state=state)[:, 10:], generate(model, ids, 10)[:, 30:]
    )


def test_prompts_are_read_in_pieces(model, monkeypatch):
    ids, lengths = prompts(3, 50), torch.tensor([50, 31, 7])
    padded = (torch.arange(50, 0, -1) <= lengths[:, None]).long()
    packed = torch.ones_like(ids).index_fill(1, torch.arange(20, 50), 2)
    masks = (None, padded, packed)
    whole = [generate(model, ids, 20, attention_mask=mask) for mask in masks]
    monkeypatch.setattr("phase2.inference.PIECE", 10)  # 20 is where a document ends
    for mask, expected in zip(masks, whole):
        assert torch.equal(generate(model, ids, 20, attention_mask=mask), expected)
    read = []
    hook = model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    generate(model, ids, 1, attention_mask=padded)
    hook.remove()
    assert read == [10] * 5 + [1]


def test_generate_returns_the_state_to_go_on_from(model):
    ids = prompts(2, 8)
    written, state = generate(model, ids, 20, return_state=True)
    assert state.position == (28, 28)
    with torch.no_grad():
        expected = model(torch.cat((written, ids), dim=1))
        found = model(ids, state=state)
    torch.testing.assert_close(found, expected[:, 28:], atol=1e-4, rtol=1e-4)


def test_memory_a_token_is_constant(model):
    def size(steps):
        def tokens():
            states.append((yield from stream(model, prompts(1, 4), steps)))

        states = []
        assert len(list(tokens())) == steps
        assert not any(x.requires_grad for layer in states[0].layers for x in layer)
        return sum(x.numel() for layer in states[0].layers for x in layer)

    assert size(3) == size(200)


def test_a_row_that_stopped_repeats_the_stop_token_and_all_stopped_is_the_end(model):
    ids = prompts(3, 6)
    free = generate(model, ids, 40)[:, 6:]
    stop = int(free[0, 10])
    found = generate(model, ids, 40, stop_token=stop)[:, 6:]
    for row, full in zip(found, free):
        end = full.tolist().index(stop) if stop in full else len(row) - 1
        assert torch.equal(row[: end + 1], full[: end + 1])
        assert (row[end:] == stop).all() or stop not in full
    single = generate(model, ids[:1], 40, stop_token=stop)
    assert single.shape[1] == 6 + free[0].tolist().index(stop) + 1


def test_nothing_generated_and_top_k_above_the_vocabulary(model):
    ids = prompts(2, 5)
    assert torch.equal(generate(model, ids, 0), ids)
    torch.manual_seed(0)
    wide = generate(model, ids, 5, temperature=1.0, top_k=1000)
    torch.manual_seed(0)
    assert torch.equal(wide, generate(model, ids, 5, temperature=1.0))


def test_sampled_frequencies_are_the_probabilities():
    p = torch.tensor([0.02, 0.5, 0.18, 0.3])
    logits = p.log().expand(40_000, -1)

    def frequencies(**options):
        return torch.bincount(choose_token(logits, **options), minlength=4) / 40_000

    cases = [
        ({"temperature": 1.0}, p),
        ({"temperature": 0.5}, p**2),
        ({"temperature": 1.0, "top_k": 2}, p * torch.tensor([0, 1, 0, 1])),
        ({"temperature": 1.0, "top_p": 0.5}, p * torch.tensor([0, 1, 0, 0])),
        ({"temperature": 1.0, "top_p": 0.51}, p * torch.tensor([0, 1, 0, 1])),
        ({"temperature": 1.0, "top_p": 1.0}, p),
    ]
    for options, weights in cases:
        expected = weights / weights.sum()
        torch.testing.assert_close(frequencies(**options), expected, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer of at least 0, got -1"),
        ({"max_new_tokens": None}, "max_new_tokens must be an integer .*None"),
        ({"temperature": -1.0}, "temperature must be a number of at least 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be a number .*got nan"),
        ({"stop_token": [1, 2]}, r"stop_token must be an integer of at least 0, got \[1, 2\]"),
        ({"stop_token": 1.5}, "stop_token must be an integer of at least 0, got 1.5"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k must be an integer of at least 1, got 2.5"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be a number above 0 and at most 1, got 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p must be a number above 0 and at most 1"),
        ({"top_k": 5}, "top_k needs a temperature above 0 .*top_k=5"),
        ({"top_p": 0.5}, "top_p needs a temperature above 0"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": torch.tensor([[256]])}, "from 0 to 255"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "pad on the left; row 0 ends in 0"),
        ({"attention_mask": torch.ones(2, 2)}, "attention_mask must have the shape"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_what_means_nothing_is_refused_at_once(model, options, message):
    arguments = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 5} | options
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)
    if arguments["max_new_tokens"] is not None:
        with pytest.raises(ValueError, match=message):
            stream(model, **arguments)  # before the first token is asked for


def test_scores_do_not_depend_on_the_pieces(model):
    ids = prompts(300)
    logits = model(ids[None, :-1])[0]
    expected = F.cross_entropy(logits, ids[1:], reduction="none").detach()
    for piece in (1, 7, 16, 299, 10_000):
        found = torch.cat(list(surprisals(model, ids, piece)))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    result = evaluate(model, ids, piece=64)
    assert result["tokens"] == 299
    assert result["loss"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))
    per_byte = evaluate(model, ids, n_bytes=2 * 299)["bits_per_byte"]
    assert per_byte == pytest.approx(result["bits_per_byte"] / 2, abs=1e-5)


def test_texts_are_only_sliced(model):
    np = pytest.importorskip("numpy")
    ids = prompts(100)

    class Sliced:
        def __len__(self):
            return 100

        def __getitem__(self, key):
            assert isinstance(key, slice) and key.stop - (key.start or 0) <= 33
            return ids[key]

    loss = evaluate(model, ids)["loss"]
    for other in (ids.tolist(), ids.numpy().astype(np.uint8), Sliced()):
        assert evaluate(model, other, piece=32)["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ids": [1]}, "ids must hold at least two"),
        ({"ids": []}, "ids must hold at least two"),
        ({"ids": [1, 2], "piece": 0}, "piece must be"),
        ({"ids": [1, 2, 300]}, "got 300"),  # a token that is only predicted
        ({"ids": [1, 2, -100]}, "got -100"),  # which a loss of torch would skip
        ({"ids": torch.zeros(1, 9, dtype=torch.long)}, r"ids must be integers of shape \(N,\)"),
        ({"ids": [1, 2], "n_bytes": -1}, "n_bytes must be a number above 0, got -1"),
        ({"ids": [1, 2], "n_bytes": 0}, "n_bytes must be a number above 0, got 0"),
    ],
    ids=str,
)
def test_texts_that_cannot_be_scored(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, **wrong)


@pytest.mark.parametrize("text", ["", "plain", "naïve 東京 🙂", "ends in é"])
def test_text_round_trip_in_whole_characters(text):
    ids = ByteTokenizer().encode(text)
    pieces = list(stream_text(i[None] for i in ids))
    assert "".join(pieces) == text and all(len(piece) == 1 for piece in pieces)


def test_bytes_that_are_no_text_are_shown_and_do_not_hold_back_the_rest():
    assert "".join(stream_text([0xFF, ord("a"), 0xE6])) == "\ufffda\ufffd"
    assert len(list(stream_text([0xFF] * 100))) > 90  # the last few may be of a character


@given(st.binary(max_size=40))
def test_any_bytes_are_streamed_as_they_decode(raw):
    assert "".join(stream_text(raw)) == raw.decode(errors="replace")


def test_ids_that_are_no_bytes_are_shown():
    """A model may know more tokens than there are bytes."""
    assert ByteTokenizer().decode([104, 300, 105]) == "h\ufffdi"


def test_a_stop_token_is_no_text():
    assert "".join(stream_text([104, 105, 0, 0], stop_token=0)) == "hi"


def session(model, lines, **options):
    lines, written = iter(lines), []

    def read(_):
        return next(lines, None) or end()

    def end():
        raise EOFError

    interact(model, read=read, write=lambda *x, **_: written.append("".join(x)), **options)
    return "".join(written)


def test_a_session_goes_on_from_a_state_and_refuses_other_options_at_once(model):
    _, state = model(BYTES.encode("before")[None].long(), return_state=True)
    ids = BYTES.encode("beforego")[None].long()
    row = generate(model, ids, 8)[0, ids.shape[1] :].tolist()
    assert session(model, ["go"], max_new_tokens=8, state=state).startswith(
        "".join(stream_text(row))
    )
    for wrong in ({"top": 3}, {"attention_mask": torch.ones(1, 2)}):
        with pytest.raises(ValueError, match="unknown key"):
            session(model, [], **wrong)


def test_prompts_stay_on_their_device():
    rows, mask = pad_left([torch.ones(n, dtype=torch.int64, device="meta") for n in (2, 3)])
    assert rows.device == mask.device == torch.device("meta")


def test_a_path_is_no_prompt(model):
    with pytest.raises(TypeError, match="prompts must be str, bytes or several, got PosixPath"):
        generate_text(model, Path("a.txt"), 3)
    with pytest.raises(TypeError, match=r"got Tensor \(generate takes token ids\)"):
        generate_text(model, torch.zeros(1, 3, dtype=torch.long), 5)


def test_from_text_to_text(model):
    texts = ["Hello there", "A", "naïve"]
    together = generate_text(model, texts, 12)
    assert together == [generate_text(model, text, 12) for text in texts]
    ids = BYTES.encode("A")[None].long()
    row = generate(model, ids, 12, stop_token=BYTES.end)[0, 1:].tolist()
    row = row[: row.index(BYTES.end)] if BYTES.end in row else row
    assert together[1] == BYTES.decode(row)
    stop = generate(model, ids, 12)[0, 5].item()
    stopped = generate_text(model, "A", 12, stop_token=stop)
    assert len(stopped) <= 4 and stopped != together[1]
    ending = copy.deepcopy(model)
    ending.tokenizer = ByteTokenizer()
    ending.tokenizer.end = stop  # which ends a row if nothing else is asked for
    assert generate_text(ending, "A", 12) == stopped
    with pytest.raises(ValueError, match="one by one, got 2 at once"):
        list(stream_text(stream(model, torch.zeros(2, 3, dtype=torch.long), 4)))


def test_bits_per_byte_count_the_bytes_of_the_tokens():
    text = "squares and squares of squares; " * 20
    pairs = text_data(text, "bpe", vocab_size=270).tokenizer
    wide = create_phase2_model(d_model=16, n_layers=1, n_heads=1, vocab_size=270)
    ids = pairs.encode(text)
    unknown = evaluate(wide, ids)
    assert unknown["bits_per_byte"] is None
    with pytest.raises(ValueError, match="no tokenizer for its 270 tokens"):
        evaluate(wide, text)
    wide.tokenizer = pairs
    size = len(text.encode()) - len(pairs.decode(ids[:1]).encode())
    expected = unknown["loss"] * (len(ids) - 1) / math.log(2) / size
    for scores in (evaluate(wide, ids, piece=7), evaluate(wide, text)):
        assert scores["bits_per_byte"] == pytest.approx(expected)


@pytest.mark.parametrize("piece", [1, 3, 64])
def test_bytes_do_not_depend_on_the_pieces(piece):
    """Characters of several tokens, and documents' ends, which count as one byte."""
    text = "naïve 東京 🙂 " * 5
    data = text_data([text, text], "bpe", vocab_size=262, held_out=0)
    wide = create_phase2_model(d_model=16, n_layers=1, n_heads=1, vocab_size=262)
    wide.tokenizer = data.tokenizer
    ids = torch.cat((torch.tensor([ord("x")]), data.train.ids))
    scores = evaluate(wide, ids, piece=piece)
    assert data.train.size == 2 * len(text.encode()) + 1
    nats = scores["loss"] * scores["tokens"]
    assert scores["bits_per_byte"] == pytest.approx(nats / math.log(2) / data.train.size)


def test_text_where_ids_are_wanted(model):
    for wrong in (lambda: generate(model, "Once", 5), lambda: model([[1, 2]])):
        with pytest.raises(TypeError, match="input_ids must be a tensor, got"):
            wrong()
    for wrong in (lambda: pad_left(["Hello"]), lambda: list(surprisals(model, "Hello"))):
        with pytest.raises(TypeError, match="encode the text first"):
            wrong()


def test_a_session_remembers_until_it_is_reset(model):
    def text(*parts):
        return ByteTokenizer().decode(torch.cat(parts))

    first, second = (ByteTokenizer().encode(x).long()[None] for x in ("abc", "de"))
    one = generate(model, first, 12)
    two = generate(model, torch.cat((one, second), dim=1), 12)[:, -12:]
    alone = generate(model, second, 12)[:, -12:]
    assert not torch.equal(two, alone)
    said = session(model, ["abc", "de"], max_new_tokens=12)
    assert said == text(one[0, 3:]) + text(two[0])
    said = session(model, ["abc", "reset", "de", "quit", "abc"], max_new_tokens=12)
    assert said == text(one[0, 3:]) + text(alone[0])


def test_a_session_stops_at_the_stop_token(model):
    prompt = ByteTokenizer().encode("abc").long()[None]
    free = generate(model, prompt, 12)[0, 3:].tolist()
    stop = free[5]
    said = session(model, ["abc"], max_new_tokens=12, stop_token=stop)
    assert said == ByteTokenizer().decode(free[: free.index(stop)])


def test_a_session_speaks_with_the_tokenizer_of_the_model(model):
    class Shouting(ByteTokenizer):
        def decode(self, ids):
            return "X" * len(ids)

    model.tokenizer = Shouting()
    try:
        assert session(model, ["abc"], max_new_tokens=12) == "X" * 12
    finally:
        del model.tokenizer


def test_a_session_ends_at_ctrl_c(model):
    def interrupted(_):
        raise KeyboardInterrupt

    written = []
    interact(model, read=interrupted, write=lambda *x: written.append(x))
    assert written == [()]  # the shell's prompt begins a line


def test_tokenizers_that_drop_a_space_at_the_beginning():
    library = pytest.importorskip("tokenizers")
    corpus = "Hello world, this is a small text. " * 20
    words = library.Tokenizer(library.models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = library.pre_tokenizers.Metaspace()
    words.decoder = library.decoders.Metaspace()
    options = {"vocab_size": 120, "special_tokens": ["<unk>", "</s>"], "show_progress": False}
    words.train_from_iterator([corpus], library.trainers.BpeTrainer(**options))
    data = text_data(corpus, words, held_out=0)
    tokenizer, ids = data.tokenizer, data.train.ids
    assert "".join(stream_text(ids, tokenizer.decode)) == tokenizer.decode(ids)
    model = create_phase2_model(d_model=16, n_layers=1, n_heads=1, vocab_size=120)
    model.tokenizer = words  # as it is
    prompt = tokenizer.decode(ids[:9])
    whole = tokenizer.decode(generate(model, tokenizer.encode(prompt)[None], 30)[0])
    assert prompt + generate_text(model, prompt, 30, stop_token=None) == whole
    size = len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:1]).encode())
    scores = evaluate(model, ids)
    bits = scores["loss"] * scores["tokens"] / math.log(2) / size
    assert scores["bits_per_byte"] == pytest.approx(bits)


def byte_fallback():
    """A tokenizer as Llama has one: a few letters, and a token for each byte of all others."""
    library = pytest.importorskip("tokenizers")
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"</s>": 256, "\u2581": 257}
    vocabulary |= {letter: 258 + i for i, letter in enumerate("abc")}
    model = library.models.BPE(vocabulary, [], byte_fallback=True, unk_token="</s>")
    tokenizer, decoders = library.Tokenizer(model), library.decoders
    tokenizer.normalizer = library.normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts)
    return text_data("abc" * 30, tokenizer, held_out=0).tokenizer


@given(st.text(alphabet="abc é€東🙂", min_size=1, max_size=20))
def test_characters_of_a_tokenizer_that_falls_back_on_bytes(text):
    tokenizer = byte_fallback()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(stream_text(ids, tokenizer.decode)) == text
    for cut in range(len(ids)):  # whatever is the prompt, together they are the text
        before = tokenizer.decode(ids[:cut])
        if "\ufffd" not in before:
            after = "".join(stream_text(ids[cut:], tokenizer.decode, prompt=ids[:cut]))
            assert before + after == text


def test_scores_of_files_and_of_nothing(model, tmp_path):
    path = tmp_path / "my.txt"
    path.write_bytes("café\r\n".encode("latin1") * 20)
    byte_model = create_phase2_model(d_model=16, n_layers=1, n_heads=1)
    assert evaluate(byte_model, path)["tokens"] == 6 * 20 - 1  # bytes, not replaced characters
    with pytest.raises(ValueError, match="to read that file, give a Path"):
        evaluate(byte_model, str(path))
    for wrong in (lambda: surprisals(model, [5]), lambda: surprisals(model, [5, 6], piece=0)):
        with pytest.raises(ValueError):
            wrong()  # at once, not at the first piece


def test_ids_of_any_integer_type(model):
    ids = prompts(1, 40)
    expected = evaluate(model, ids[0])
    for dtype in (torch.uint16, torch.int32):
        assert torch.equal(model(ids.to(dtype)), model(ids))
        assert evaluate(model, ids[0].to(dtype)) == expected
    frozen = ids[0].numpy().astype("uint16")
    frozen.setflags(write=False)  # as a memory map is
    assert evaluate(model, frozen) == expected


def test_the_state_is_not_asked_of_text(model):
    with pytest.raises(TypeError, match="takes and gives text alone: return_state"):
        generate_text(model, "a", 5, return_state=1)


def test_lines_of_other_systems(model):
    lines = "abc", "reset", "de", "quit", "abc"
    ours, theirs = (
        session(model, [line + end for line in lines], max_new_tokens=12) for end in ("", "\r")
    )
    assert theirs == ours


def test_rows_that_are_not_there_and_tokens_that_are_none(model):
    assert generate(model, torch.zeros(0, 4, dtype=torch.long), 5).shape == (0, 9)
    with pytest.raises(ValueError, match="stop_token must be an integer from 0 to 255, got 999"):
        generate(model, torch.zeros(1, 4, dtype=torch.long), 5, stop_token=999)


def test_a_session_ends_an_answer_at_the_end_of_a_document(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.head.weight.zero_()  # all logits equal: greedy takes token 0, the end
    assert session(model, ["go"], max_new_tokens=5) == ""
    assert session(model, ["go"], max_new_tokens=5, stop_token=1) == 5 * "\0"


def test_a_misspelt_option_is_named(model):
    with pytest.raises(ValueError, match="unknown key 'temprature', did you mean 'temperature'"):
        generate_text(model, "go", 2, temprature=1.0)


def test_what_is_no_prompt_is_called_a_prompt():
    with pytest.raises(ValueError, match="^prompts must be integers"):
        pad_left([torch.tensor([0.5])])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}])
def test_a_broken_model_generates_nothing(options):
    """Sampling from NaN would end a process's use of a GPU."""
    broken = create_phase2_model(d_model=16, n_layers=1, n_heads=1)
    with torch.no_grad():
        broken.head.weight[7] = math.nan
    for length in (1, 5):
        with pytest.raises(ValueError, match="logits must be finite"):
            generate(broken, prompts(2, length), 3, **options)


def test_prompts_of_any_integer_type(model):
    ids = prompts(2, 6)
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        assert torch.equal(generate(model, ids.to(dtype), 3), generate(model, ids, 3))


def test_an_unknown_option_is_named(model):
    with pytest.raises(ValueError, match="unknown key 'temprature', did you mean 'temperature'"):
        generate(model, prompts(1, 3), 2, temprature=3)


def test_the_held_out_part_of_data_is_evaluated_as_it_is(model):
    data = text_data("".join(f"{n} is {n * n}; " for n in range(99)), held_out=0.2)
    assert evaluate(model, data.held_out) == evaluate(model, data.held_out.ids)
