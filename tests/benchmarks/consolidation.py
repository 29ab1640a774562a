"""What consolidation costs, forward + backward: a layer's memory with and without it.

    python tests/benchmarks/consolidation.py [--device cuda]

Then the same of all that mixes tokens in a layer, projections included; and what the factorizations
and products of the looks take alone, which is the least that they can add.
"""

import argparse

import torch
from memory import inputs
from timing import best, in_turns, machine

from phase2 import Phase2Config
from phase2.consolidation import empty_memory, remember
from phase2.model import Phase2Block, mix_tokens
from phase2.resonance import resonance_basis

HEADS, DIM = 4, 64
EVERY = (10**9, 512, 256, 128, 64)  # tokens between two looks
SHAPES = [(4, 512), (1, 2048)]  # a training batch, and one long text


def memory(batch, length, device):
    """A layer's memory alone: functions by the number of tokens between two looks."""
    tensors = inputs((batch, length, HEADS, DIM), torch.float32, device)
    empty = empty_memory(batch, HEADS, DIM, device)
    basis = resonance_basis("zeta", DIM).to(device)

    def run(every):
        config = Phase2Config(consolidate_every=every)
        y, _, _ = remember(*tensors, empty, 0, basis, config)
        torch.autograd.grad(y.sum(), tensors)

    return {every: lambda every=every: run(every) for every in EVERY}


def layer(batch, length, device):
    """All that mixes tokens in a layer, :func:`~phase2.model.mix_tokens`, likewise."""
    x = torch.randn(batch, length, HEADS * DIM, device=device, requires_grad=True)
    empty = empty_memory(batch, HEADS, DIM, device)
    blocks = {n: Phase2Block(Phase2Config(consolidate_every=n)).to(device) for n in EVERY}

    def run(block):
        mix_tokens(block, x, empty, 0)[0].sum().backward()

    return {n: lambda block=block: run(block) for n, block in blocks.items()}


def least(batch, looks, device):
    """Seconds of the factorizations and products of `looks` one after the other, and no more."""
    w = torch.randn(batch * HEADS, DIM, DIM, device=device)
    wide = w.double()
    gram, root = wide @ wide.mT, wide.tril()

    def look():
        wide @ wide.mT
        for _ in range(2):
            torch.linalg.cholesky_ex(gram)
        torch.linalg.solve_triangular(root, wide, upper=False)
        for _ in range(6 + 5):  # 1 − G, what is kept, to the modes and back; the backward pass
            w @ w

    return looks * best(look, repeats=25)


def report(what, functions, length):
    """Time functions by the number of tokens between two looks, and print what looking adds."""
    seconds = in_turns(functions, repeats=25)
    never = seconds.pop(EVERY[0])
    print(f"{what}\n{'never':>12}: {1e3 * never:7.2f} ms")
    for every, found in seconds.items():
        looks, extra = (length - 1) // every, 100 * (found / never - 1)
        print(f"{f'every {every}':>12}: {1e3 * found:7.2f} ms, {looks} looks, {extra:+.0f} %")
    return never


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    print(machine(device))
    for batch, length in SHAPES:
        print(f"\nB {batch}, N {length}, H {HEADS}, D {DIM}, float32, forward + backward")
        alone = report("the memory alone", memory(batch, length, device), length)
        report("with norm, projections and rates", layer(batch, length, device), length)
        looks = (length - 1) // Phase2Config().consolidate_every
        extra = least(batch, looks, device)
        what = "factorizations and products of the looks of the default interval"
        print(f"{what}: {1e3 * extra:.2f} ms, {100 * extra / alone:+.0f} % of the memory alone")


if __name__ == "__main__":
    main()
