"""What a token costs when decoding, early and late in a text, beside two peers of equal size.

    pip install ".[bench]"; python tests/benchmarks/decoding.py [--positions 100 1000] [--compile]

phase2 and Mamba2 keep a state of fixed size; Llama keeps a key and a value for every token. The
limit is reading the weights once a token, which is measured first. Llama is left out beyond
10 000 tokens. With --compile all of them go through torch.compile; the median leaves the compiling
out.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from timing import machine
from training import models

from phase2.model import linear

ROUNDS, TURN = 15, 10  # the models take turns of 10 tokens
LONGEST = 10_000  # for Llama
CACHE = {"Llama": "past_key_values", "Mamba2": "cache_params"}


def advance(model, name, ids, cache):
    """Read ids after the cache: the logits of the last token, and the new cache."""
    if name == "phase2":
        logits, cache = model(ids, state=cache, return_state=True)
        return logits[:, -1:], cache
    kind = CACHE[name.split()[0]]
    found = model(ids, use_cache=True, **({kind: cache} if cache is not None else {}))
    return found.logits[:, -1:], getattr(found, kind)


def read(model, name, count):
    """The cache after a text of `count` tokens; in one piece for peers, which cannot all go on."""
    torch.manual_seed(0)
    text, cache = torch.randint(0, 256, (1, count)), None
    for piece in text.split(4096 if name == "phase2" else count, dim=1):
        _, cache = advance(model, name, piece, cache)
    return cache


def decode(models, position, prepare):
    """Median seconds a token of each model, prepared for it, after `position` tokens."""
    names = [name for name in models if "Llama" not in name or position <= LONGEST]
    caches = {name: read(models[name], name, position) for name in names}
    ready = {name: prepare(models[name]) for name in names}
    times, token = {name: [] for name in names}, torch.zeros(1, 1, dtype=torch.long)
    for _ in range(ROUNDS):
        for name in names:
            for _ in range(TURN):
                start = time.perf_counter()
                logits, caches[name] = advance(ready[name], name, token, caches[name])
                token = logits.argmax(-1)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def weights_once(model, product):
    """Seconds of a product of one row with every weight matrix, read from memory: the limit."""
    pairs = [(torch.zeros(1, w.shape[1]), w) for w in model.parameters() if w.dim() == 2]
    elsewhere, times = torch.zeros(2**25), []
    for _ in range(50):
        elsewhere += 1  # 128 MiB, which push the weights out of every cache
        start = time.perf_counter()
        for x, w in pairs:
            product(x, w)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--compile", action="store_true")
    settings = parser.parse_args()
    torch.manual_seed(0)
    built = {name: make().eval() for name, make in models().items()}
    print(machine())
    once, plain = (1e3 * weights_once(built["phase2"], by) for by in (linear, F.linear))
    print(f"the weights alone: {once:.2f} ms a token, by F.linear {plain:.2f} ms")
    first = None
    for position in settings.positions:
        found = decode(built, position, torch.compile if settings.compile else lambda model: model)
        first = first or found["phase2"]
        each = ", ".join(
            f"{name} {1e3 * x:.2f} ms ({x / found['phase2']:.2f} x)" for name, x in found.items()
        )
        print(f"token {position:>7}: {each}; phase2 at {found['phase2'] / first:.2f} of its first")


if __name__ == "__main__":
    main()
