"""Chunked memory against the recurrence and attention: forward + backward, side by side.

    python tests/benchmarks/memory.py [--length 2048]

The physical limit is the machine's matrix-product rate: a chunk of C tokens needs 4 C D + 4 D² FLOP
a token and head forward, twice that backward.
"""

import argparse

import torch
import torch.nn.functional as F
from timing import best, machine, product_rate

from phase2.memory import memory_chunked, memory_recurrent

BATCH, HEADS, DIM, CHUNK = 1, 4, 64, 64


def inputs(length):
    """q, k, v, Γ, V, η that need gradients; V turns several times within a chunk."""
    shape = (BATCH, length, HEADS, DIM)
    q, v, k = torch.randn(shape), torch.randn(shape), F.normalize(torch.randn(shape), dim=-1)
    gamma, eta = 0.01 + 0.1 * torch.rand(2, *shape[:3])
    return [x.requires_grad_() for x in (q, k, v, gamma, torch.randn(shape[:3]), eta)]


def forward_backward(memory, tensors):
    """One call and the gradients of all its inputs."""
    y = memory(*tensors)
    y = y[0] if isinstance(y, tuple) else y
    torch.autograd.grad(y.sum(), tensors)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=2048)
    length = parser.parse_args().length
    torch.manual_seed(0)
    tensors = inputs(length)
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors[:3]]

    def attention(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    chunked = best(lambda: forward_backward(memory_chunked, tensors), repeats=15)
    softmax = best(lambda: forward_backward(attention, heads_first))
    loop = best(lambda: forward_backward(memory_recurrent, tensors), repeats=2)
    flops = 3 * BATCH * length * HEADS * (4 * CHUNK * DIM + 4 * DIM * DIM)
    print(machine())
    print(f"B {BATCH}, N {length}, H {HEADS}, D {DIM}, float32, V on, forward + backward")
    rows = {"chunked": chunked, "attention": softmax, "recurrence": loop}
    for name, seconds in rows.items():
        rate = BATCH * length / seconds
        print(
            f"{name:>12}: {1e3 * seconds:9.1f} ms {rate:9.0f} tokens/s {seconds / chunked:7.1f} x"
        )
    share = flops / chunked / product_rate()
    print(f"chunked runs its matrix products at {100 * share:.0f} % of the largest product's rate")


if __name__ == "__main__":
    main()
