"""What consolidation costs: a layer's memory with and without it, forward + backward.

python tests/benchmarks/consolidation.py
"""

import torch
import torch.nn.functional as F
from timing import best, machine

from phase2 import Phase2Config
from phase2.consolidation import empty_memory, remember
from phase2.resonance import resonance_basis

BATCH, LENGTH, HEADS, DIM = 4, 512, 4, 64


def main():
    torch.manual_seed(0)
    shape = (BATCH, LENGTH, HEADS, DIM)
    q, v, k = torch.randn(shape), torch.randn(shape), F.normalize(torch.randn(shape), dim=-1)
    gamma, eta = 0.01 + 0.1 * torch.rand(2, *shape[:3])
    tensors = [x.requires_grad_() for x in (q, k, v, gamma, torch.randn(shape[:3]), eta)]
    empty, basis = empty_memory(BATCH, HEADS, DIM), resonance_basis("zeta", DIM)

    def run(every):
        config = Phase2Config(consolidate_every=every)
        y, _, _ = remember(*tensors, empty, 0, basis, config)
        torch.autograd.grad(y.sum(), tensors)

    print(machine())
    print(f"B {BATCH}, N {LENGTH}, H {HEADS}, D {DIM}, float32, forward + backward")
    never = best(lambda: run(10**9), repeats=15)
    print(f"{'never':>12}: {1e3 * never:7.2f} ms")
    for every in (256, 128, 64, 32):
        seconds = best(lambda every=every: run(every), repeats=15)
        extra = 100 * (seconds / never - 1)
        print(f"{'every ' + str(every):>12}: {1e3 * seconds:7.2f} ms, {extra:+.0f} %")


if __name__ == "__main__":
    main()
