# Generated from notebooks/09_inference.ipynb; edit the notebook, not this file.
"""Inference."""

import math
import os
from collections.abc import Iterable
from itertools import chain, count, groupby

import torch

from phase2.model import check_input, check_keys, check_value, real, whole
from phase2.training import ByteTokenizer, Tokens, as_tokenizer, read_documents

__all__ = [
    "choose_token",
    "SAMPLING_RULES",
    "check_sampling",
    "check_prompt",
    "stream",
    "PIECE",
    "read_prompt",
    "stream_steps",
    "generate",
    "as_ids",
    "pad_left",
    "BYTES",
    "tokenizer_of",
    "stream_text",
    "UNFINISHED",
    "follow",
    "generate_text",
    "surprisals",
    "surprisal_pieces",
    "bytes_predicted",
    "text_ids",
    "evaluate",
    "interact",
    "answer",
]


# %% notebooks/09_inference.ipynb#choose
def choose_token(logits, temperature=0.0, top_k=None, top_p=None, generator=None):
    """One token for each row of logits: equation (eq-temperature) on what the filters leave.

    Args:
        logits: z, (B, vocab_size).
        temperature: T; 0 takes the largest logit.
        top_k: how many of the largest logits to keep; None keeps all.
        top_p: keep the fewest tokens that have this much probability together; None keeps all.
        generator: torch.Generator on the device of the logits; None is the global one.

    Returns:
        Tokens, (B,). Options are not checked here, but by :func:`stream`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    kept = min(top_k or logits.shape[-1], logits.shape[-1])
    largest, tokens = torch.topk(logits.float(), kept)  # both (B, kept), largest first
    behind = largest - largest[:, :1]  # 0 for the first, so that no T is too small to divide by
    p = torch.softmax(behind / max(temperature, torch.finfo(behind.dtype).tiny), dim=-1)
    if top_p is not None:
        above = p.cumsum(-1) - p  # what more probable tokens have together; 0 for the first
        p = p.masked_fill(above >= top_p, 0)
    place = torch.multinomial(p, 1, generator=generator)
    return tokens.gather(-1, place).squeeze(-1)


# %% notebooks/09_inference.ipynb#checks
SAMPLING_RULES = {  # what is allowed in each option of `stream`
    "max_new_tokens": whole(0),
    "stop_token": whole(0),
    "temperature": real(0),
    "top_k": whole(1),
    "top_p": real(0, highest=1, above=True),
}


def check_sampling(temperature, **optional):
    """Refuse options that mean nothing: `temperature`, and others that are not None.

    Rules are in `SAMPLING_RULES`.

    Raises:
        ValueError: a value out of range, or a filter at temperature 0, where nothing is sampled.
    """
    given = {name: value for name, value in optional.items() if value is not None}
    for name, value in {"temperature": temperature, **given}.items():
        check_value(name, value, SAMPLING_RULES[name])
    filters = given.keys() & {"top_k", "top_p"}
    if filters and temperature == 0:
        name = min(filters)
        raise ValueError(
            f"{name} needs a temperature above 0 (0 is greedy), got {name}={given[name]}"
        )


# %% notebooks/09_inference.ipynb#check-prompt
def check_prompt(input_ids, state, attention_mask, config):
    """Refuse prompts that nothing can follow.

    Raises:
        ValueError: see :func:`phase2.model.check_input`; also no token at all, or a row whose last
            position is padding.
    """
    check_input(input_ids, state, attention_mask, config)
    if not input_ids.shape[1]:
        raise ValueError("input_ids must hold at least one token in each row, got shape (B, 0)")
    if attention_mask is not None and not attention_mask[:, -1].all():
        row = int((attention_mask[:, -1] == 0).nonzero()[0])
        raise ValueError(
            f"attention_mask must be 1 at the end of each row: pad on the left; row {row} ends in 0"
        )


# %% notebooks/09_inference.ipynb#stream
def stream(
    model,
    input_ids,
    max_new_tokens=None,
    temperature=0.0,
    top_k=None,
    top_p=None,
    attention_mask=None,
    generator=None,
    stop_token=None,
    state=None,
):
    """Continue prompts token by token: equation (eq-generate).

    A token takes the same time wherever it stands. Prompts are read in pieces: beyond 1024 tokens
    their length costs time but no RAM, unless several documents are packed into a row.

    Args:
        model: Phase2IntegratedModel.
        input_ids: (B, N), N ≥ 1; prompts of different lengths are padded on the left.
        max_new_tokens: where to end; None goes on for as long as it is asked.
        temperature, top_k, top_p, generator: see :func:`choose_token`.
        attention_mask: (B, N), 0 for padding.
        stop_token: token after which a row is over; it is repeated until all rows are.
        state: Phase2State to go on from; None is an empty memory.

    Returns:
        Iterator of tokens, (B,) each. Its return value (that of `yield from`) is the Phase2State
        that has read the prompts and all of those tokens: only new text may follow it.

    Raises:
        TypeError, ValueError: see :func:`check_sampling` and :func:`check_prompt`.
    """
    limits = {"max_new_tokens": max_new_tokens, "stop_token": stop_token}
    check_sampling(temperature, top_k=top_k, top_p=top_p, **limits)
    check_prompt(input_ids, state, attention_mask, model.config)
    check_value("stop_token", stop_token or 0, whole(0, highest=model.config.vocab_size - 1))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
    rest = max_new_tokens, stop_token, options
    return stream_steps(model, input_ids, state, attention_mask, *rest)


# %% notebooks/09_inference.ipynb#stream-steps
PIECE = 1024  # tokens of a prompt that are read at once


def read_prompt(model, input_ids, state, attention_mask):
    """Read prompts, piece by piece: the logits after them, (B, vocab_size), and the state."""
    numbers = () if attention_mask is None else attention_mask[attention_mask != 0].unique()
    # a state does not know which document it is in: several in a row are not cut
    size = PIECE if len(numbers) < 2 else input_ids.shape[1]
    for start in range(0, input_ids.shape[1], size):
        mask = None if attention_mask is None else attention_mask[:, start : start + size]
        logits, state = model(input_ids[:, start : start + size], state, mask, return_state=True)
    return logits[:, -1], state


@torch.no_grad()
def stream_steps(model, input_ids, state, attention_mask, max_new_tokens, stop_token, options):
    """The loop of :func:`stream`, its arguments checked."""
    logits, state = read_prompt(model, input_ids, state, attention_mask)
    if not logits.isfinite().all():  # sampling from them would end a process's use of a GPU
        raise ValueError("logits must be finite, they hold NaN or infinity (are the weights?)")
    over = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
    for _ in count() if max_new_tokens is None else range(max_new_tokens):
        token = choose_token(logits, **options)  # (B,)
        if stop_token is not None:
            token = torch.where(over, stop_token, token)
            over = token == stop_token
        yield token
        logits, state = read_prompt(model, token[:, None], state, None)
        if stop_token is not None and over.all():
            break
    return state


# %% notebooks/09_inference.ipynb#generate
def generate(model, input_ids, max_new_tokens, return_state=False, **options):
    """Prompts and what follows: :func:`stream`, collected.

    Args:
        model, input_ids, max_new_tokens: see :func:`stream`.
        return_state: also return the Phase2State after the last token, to go on from.
        options: all others of :func:`stream`, by name.

    Returns:
        (B, N + new), new ≤ max_new_tokens: less if every row has met its `stop_token`; and the
        state, if asked for.

    Raises:
        TypeError, ValueError: see :func:`stream`.
    """
    if max_new_tokens is None:
        raise ValueError(
            "max_new_tokens must be an integer of at least 0, got None; stream() has no end"
        )

    check_keys(options, [*SAMPLING_RULES, "attention_mask", "generator", "state"])

    def tokens():
        nonlocal state
        state = yield from stream(model, input_ids, max_new_tokens, **options)

    state = None
    new = [token[:, None] for token in tokens()]
    ids = torch.cat((input_ids.long(), *new), dim=1)
    return (ids, state) if return_state else ids


# %% notebooks/09_inference.ipynb#as-ids
def as_ids(ids, device=None, name="ids"):
    """Token ids from a list, array or tensor: int64 (N,).

    Raises:
        TypeError, ValueError: they are text, or no integers of this shape.
    """
    if isinstance(ids, str | bytes):
        raise TypeError(f"{name} must be integers, got {type(ids).__name__}: encode the text first")
    try:
        ids = (ids if torch.is_tensor(ids) else torch.tensor(ids)).to(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a list, array or tensor of integers ({error})") from error
    whole_numbers = not (ids.is_floating_point() or ids.dtype == torch.bool)
    if ids.dim() != 1 or (len(ids) and not whole_numbers):
        raise ValueError(
            f"{name} must be integers of shape (N,), got {tuple(ids.shape)} of {ids.dtype}"
        )
    return ids.long()


# %% notebooks/09_inference.ipynb#pad
def pad_left(prompts):
    """Prompts of different lengths as one batch.

    Args:
        prompts: lists of token ids, or 1-D tensors, none empty.

    Returns:
        `input_ids` and `attention_mask`, (B, N) each, N the longest; both 0 where padded.

    Raises:
        TypeError, ValueError: no prompt, an empty one, or one that is no ids.
    """
    prompts = [as_ids(prompt, name="prompts") for prompt in prompts]
    if not prompts or not all(len(prompt) for prompt in prompts):
        lengths = [len(prompt) for prompt in prompts]
        raise ValueError(f"prompts must be at least one, none of them empty, got lengths {lengths}")
    backwards = [prompt.flip(0) for prompt in prompts]
    rows = torch.nn.utils.rnn.pad_sequence(backwards, batch_first=True).flip(1)
    ends = torch.tensor([len(prompt) for prompt in prompts], device=rows.device)
    column = torch.arange(rows.shape[1], 0, -1, device=rows.device)  # N … 1, from the end
    return rows, (column <= ends[:, None]).long()


# %% notebooks/09_inference.ipynb#tokenizer-of
BYTES = ByteTokenizer()


def tokenizer_of(model):
    """The tokenizer of a model, or bytes.

    Raises:
        ValueError: it has none, and knows more tokens than there are bytes.
        TypeError: it is not a tokenizer, see :func:`phase2.training.as_tokenizer`.
    """
    tokenizer, size = getattr(model, "tokenizer", None), model.config.vocab_size
    if tokenizer is None and size > BYTES.vocab_size:
        raise ValueError(f"model has no tokenizer for its {size} tokens: set model.tokenizer")
    return BYTES if tokenizer is None else as_tokenizer(tokenizer)


# %% notebooks/09_inference.ipynb#text
def stream_text(tokens, decode=BYTES.decode, stop_token=None, prompt=()):
    """Tokens to pieces of text, as soon as they are whole characters.

    Args:
        tokens: iterable of tensors (1,) or ints, as :func:`stream` gives for one prompt.
        decode: function from a list of ids to text; an unfinished character becomes U+FFFD.
        stop_token: token that is no text, and is left out.
        prompt: list of the ids before them, which are not shown.

    Returns:
        Iterator of str; joined, they are what the tokens decode to.

    Raises:
        ValueError: there are several tokens at once, of a batch; see :func:`generate_text`.
    """
    before, pending, shown = [], [], 0
    for place, token in enumerate(chain(prompt, tokens), start=-len(prompt)):
        if torch.is_tensor(token) and token.numel() != 1:
            raise ValueError(f"tokens must come one by one, got {token.numel()} at once")
        if place == 0:  # what of the prompt is unfinished stays there
            before, pending, shown = [*before, *pending], [], 0
        token = int(token)
        if token == stop_token:
            continue
        pending.append(token)
        text = follow(before, pending, decode)
        done = text.rstrip("\ufffd")  # a character that is not finished
        if len(text) - len(done) > UNFINISHED:  # that is no character at all
            done = text.removesuffix("\ufffd")
        if len(done) > shown and place >= 0:
            yield done[shown:]
        shown = max(shown, len(done))
        if text and done == text:
            before, pending, shown = pending, [], 0
    if pending and place >= 0:
        yield follow(before, pending, decode)[shown:]


# %% notebooks/09_inference.ipynb#follow
# U+FFFD of an unfinished character: one for each of its 3 bytes, and of the 4 of the one before
UNFINISHED = 7


def follow(before, tokens, decode):
    """The text of some tokens after others: some tokenizers drop a space where a text begins."""
    return decode([*before, *tokens])[len(decode(before)) if before else 0 :]


# %% notebooks/09_inference.ipynb#generate-text
def generate_text(model, prompts, max_new_tokens, **options):
    """What follows some text: :func:`generate` between two tokenizations.

    Args:
        model: Phase2IntegratedModel, with a `tokenizer` or of bytes.
        prompts: a str (or bytes), or a list of them, none empty.
        max_new_tokens: see :func:`stream`.
        options: others of :func:`stream`, by name; a row ends at the `end` of the tokenizer if
            there is no other `stop_token`.

    Returns:
        A str, or a list of them; the prompts are not repeated.

    Raises:
        TypeError, ValueError: see :func:`stream`, :func:`pad_left` and :func:`tokenizer_of`.
    """
    if taken := options.keys() & {"return_state", "attention_mask"}:
        raise TypeError(f"generate_text takes and gives text alone: {min(taken)} is of generate")
    check_keys(options, [*SAMPLING_RULES, "generator", "state"])
    if not isinstance(prompts, Iterable) or torch.is_tensor(prompts):
        got = f"{type(prompts).__name__} (generate takes token ids)"
        raise TypeError(f"prompts must be str, bytes or several, got {got}")
    tokenizer, alone = tokenizer_of(model), isinstance(prompts, str | bytes | bytearray)
    prompts = [tokenizer.encode(text) for text in ([prompts] if alone else prompts)]
    ids, mask = (x.to(model.embedding.weight.device) for x in pad_left(prompts))
    options = {"stop_token": tokenizer.end} | options
    rows = generate(model, ids, max_new_tokens, attention_mask=mask, **options)
    found = zip(rows[:, ids.shape[1] :], prompts, strict=True)
    rest = tokenizer.decode, options["stop_token"]
    texts = ["".join(stream_text(row, *rest, prompt)) for row, prompt in found]
    return texts[0] if alone else texts


# %% notebooks/09_inference.ipynb#evaluate
def surprisals(model, ids, piece=1024):
    """−ln p of every token of a text given all before it, read in pieces with carried state.

    Args:
        model: Phase2IntegratedModel.
        ids: token ids, at least two: a list, a 1-D tensor or array; only slices of it are held.
        piece: tokens read at once; changes the RAM it takes, not the result.

    Returns:
        Iterator of tensors in nats, one for each piece, N − 1 values together: nothing predicts
        the first token.

    Raises:
        ValueError: less than two tokens, a `piece` below 1, or ids that are no tokens.
    """
    check_value("piece", piece, whole(1))
    if len(as_ids(ids[:2])) < 2:
        found = f"got {len(ids)}"
        raise ValueError(f"ids must hold at least two tokens, one to predict from one, {found}")
    return surprisal_pieces(model, ids, piece)


@torch.no_grad()
def surprisal_pieces(model, ids, piece):
    """The iterator of :func:`surprisals`, its arguments checked."""
    state, device = None, model.embedding.weight.device
    for start in range(0, len(ids) - 1, piece):
        part = as_ids(ids[start : start + piece + 1], device)
        check_input(part[None], None, None, model.config)  # the last one too, only predicted
        logits, state = model(part[None, :-1], state, return_state=True)
        yield torch.nn.functional.cross_entropy(logits[0].float(), part[1:], reduction="none")


# %% notebooks/09_inference.ipynb#bytes-predicted
def bytes_predicted(model, ids, piece):
    """Bytes that all ids but the first encode; None if the tokenizer of the model is not known.

    The end of a document counts as one, as in :func:`phase2.training.tokenize`.
    """
    known = getattr(model, "tokenizer", None) is not None
    if not known and model.config.vocab_size > BYTES.vocab_size:
        return None
    tokenizer = tokenizer_of(model)
    if isinstance(tokenizer, ByteTokenizer):
        return len(ids) - 1
    parts = (as_ids(ids[start : start + piece]).tolist() for start in range(1, len(ids), piece))
    ends, size, first = 0, 0, as_ids(ids[:1]).tolist()
    first = [] if first == [tokenizer.end] else first
    for end, tokens in groupby(chain.from_iterable(parts), tokenizer.end.__eq__):
        if end:
            ends += sum(1 for _ in tokens)
        else:  # not piece by piece: a character may begin in one and end in the next
            texts = stream_text(tokens, tokenizer.decode, prompt=first)
            size += sum(len(text.encode()) for text in texts)
        first = []
    return ends + size


# %% notebooks/09_inference.ipynb#text-ids
def text_ids(model, text):
    """Token ids (N,) of a text (str, bytes) or a file (Path), for this model; ids as they are.

    Tokens, as TextData has, are their ids.

    Raises:
        TypeError, ValueError: see :func:`as_ids`; the name of a file as a text.
        OSError: the file cannot be read.
    """
    text = text.ids if isinstance(text, Tokens) else text
    if isinstance(text, str | bytes | os.PathLike):
        (document,) = read_documents(text)
        text = tokenizer_of(model).encode(text if isinstance(text, str) else document)
    return as_ids(text, name="text")


# %% notebooks/09_inference.ipynb#evaluate-all
def evaluate(model, ids, piece=1024, n_bytes=None):
    """How well a model predicts a text: equation (eq-perplexity).

    Args:
        model, ids, piece: see :func:`surprisals`; or a text or a file, see :func:`text_ids`.
        n_bytes: b, bytes that the predicted tokens encode; None counts them.

    Returns:
        dict with `loss` (nats a token), `perplexity`, `bits_per_byte` (None if there is no
        tokenizer to count bytes with) and `tokens`, how many were predicted.

    Raises:
        TypeError, ValueError: see :func:`surprisals` and :func:`text_ids`; `n_bytes` not above 0.
        OSError: the file cannot be read.
    """
    if isinstance(ids, str | bytes | os.PathLike | Tokens):  # others stay: slices are read of them
        ids = text_ids(model, ids)
    if n_bytes is not None:
        check_value("n_bytes", n_bytes, real(0, above=True))
    parts = surprisals(model, ids, piece)
    total = sum(part.double().sum().item() for part in parts)
    tokens = len(ids) - 1
    loss = total / tokens
    perplexity = math.inf if loss >= 700 else math.exp(loss)  # e^709 is the largest float
    size = n_bytes or bytes_predicted(model, ids, piece)
    bits = total / math.log(2) / size if size else None
    return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits, "tokens": tokens}


# %% notebooks/09_inference.ipynb#interact
def interact(model, max_new_tokens=200, read=input, write=print, **options):
    """A session: read a line, continue it, and remember both.

    "reset" empties the memory; "quit", the end of input or Ctrl-C ends the session.

    Args:
        model: Phase2IntegratedModel.
        max_new_tokens: the longest answer.
        read: called with the text that asks for a line, returns the line.
        write: called like print with the pieces of an answer.
        options: `temperature`, `top_k`, `top_p`, `generator`, `stop_token` (the end of a document,
            if none is given), and `state` to begin with; see :func:`stream`.

    Raises:
        TypeError, ValueError: see :func:`stream`; another option.
    """
    check_keys(options, [*SAMPLING_RULES, "generator", "state"])
    tokenizer, state = tokenizer_of(model), options.pop("state", None)
    options = {"stop_token": tokenizer.end} | options
    device = model.embedding.weight.device
    filters = {name: options[name] for name in SAMPLING_RULES.keys() & options.keys()}
    check_sampling(**{"temperature": 0.0, "max_new_tokens": max_new_tokens} | filters)
    try:
        while (line := read("> ").rstrip("\r\n")) != "quit":
            if line == "reset":
                state = None
            elif len(ids := as_ids(tokenizer.encode(line), device)):
                rest = ids[None], tokenizer.decode, max_new_tokens, write
                state = answer(model, *rest, state=state, **options)
    except (EOFError, KeyboardInterrupt):
        write()


# %% notebooks/09_inference.ipynb#answer
def answer(model, prompt, decode, max_new_tokens, write, stop_token=None, **options):
    """Write what follows a prompt (1, N), piece by piece; returns the Phase2State after it."""

    def tokens():
        nonlocal state
        state = yield from stream(model, prompt, max_new_tokens, stop_token=stop_token, **options)

    state = None
    for piece in stream_text(tokens(), decode, stop_token, prompt[0].tolist()):
        write(piece, end="", flush=True)
    write()
    return state
