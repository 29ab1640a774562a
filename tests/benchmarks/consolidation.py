"""What consolidation costs: a layer's memory with and without it, forward + backward.

python tests/benchmarks/consolidation.py [--device cuda]
"""

import argparse

import torch
from memory import inputs
from timing import in_turns, machine

from phase2 import Phase2Config
from phase2.consolidation import empty_memory, remember
from phase2.resonance import resonance_basis

HEADS, DIM = 4, 64
SHAPES = [(4, 512), (1, 2048)]  # a training batch, and one long text


def measure(batch, length, device):
    """Seconds of a layer's memory, by the number of tokens between two looks."""
    tensors = inputs((batch, length, HEADS, DIM), torch.float32, device)
    empty = empty_memory(batch, HEADS, DIM, device)
    basis = resonance_basis("zeta", DIM).to(device)

    def run(every):
        config = Phase2Config(consolidate_every=every)
        y, _, _ = remember(*tensors, empty, 0, basis, config)
        torch.autograd.grad(y.sum(), tensors)

    choices = (10**9, 512, 256, 128, 64)
    return in_turns({every: lambda every=every: run(every) for every in choices}, repeats=25)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.manual_seed(0)
    print(machine(device))
    for batch, length in SHAPES:
        seconds = measure(batch, length, device)
        never = seconds.pop(10**9)
        print(f"B {batch}, N {length}, H {HEADS}, D {DIM}, float32, forward + backward")
        print(f"{'never':>12}: {1e3 * never:7.2f} ms")
        for every, found in seconds.items():
            looks, extra = (length - 1) // every, 100 * (found / never - 1)
            print(
                f"{'every ' + str(every):>12}: {1e3 * found:7.2f} ms, {looks} looks, {extra:+.0f} %"
            )


if __name__ == "__main__":
    main()
