"""Chunked memory against the recurrence and attention: forward + backward, side by side.

    python tests/benchmarks/memory.py [--batch 1 --length 2048 --heads 4]
        [--dtype bfloat16] [--device cuda] [--compile]

The physical limit is the machine's matrix-product rate: a chunk of C tokens needs 4 C D + 4 D² FLOP
a token and head forward, twice that backward.
"""

import argparse

import torch
import torch.nn.functional as F
from timing import best, machine, product_rate

from phase2.memory import memory_chunked, memory_recurrent

DIM, CHUNK = 64, 64


def inputs(shape, dtype, device):
    """q, k, v, Γ, V, η that need gradients; V turns several times within a chunk."""
    q, v, k = torch.randn(shape), torch.randn(shape), F.normalize(torch.randn(shape), dim=-1)
    gamma, eta = 0.01 + 0.1 * torch.rand(2, *shape[:3])
    tensors = [q.to(dtype), k.to(dtype), v.to(dtype), gamma, torch.randn(shape[:3]), eta]
    return [x.to(device).requires_grad_() for x in tensors]


def forward_backward(memory, tensors):
    """One call and the gradients of all its inputs."""
    y = memory(*tensors)
    y = y[0] if isinstance(y, tuple) else y
    torch.autograd.grad(y.sum(), tensors)


def attention(q, k, v):
    """Causal softmax attention, heads first."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def options():
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    return parser.parse_args()


def main():
    given = options()
    dtype = getattr(torch, given.dtype)
    shape = (given.batch, given.length, given.heads, DIM)
    torch.manual_seed(0)
    tensors = inputs(shape, dtype, given.device)
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in tensors[:3]]
    rows = {
        "chunked": best(lambda: forward_backward(memory_chunked, tensors), repeats=15),
        "attention": best(lambda: forward_backward(attention, heads_first)),
        "recurrence": best(lambda: forward_backward(memory_recurrent, tensors), repeats=2),
    }
    if given.compile:
        compiled = torch.compile(memory_chunked)
        rows["compiled"] = best(lambda: forward_backward(compiled, tensors), repeats=15)
    print(machine(given.device, dtype))
    print(f"B, N, H, D = {shape}, {dtype}, {given.device}, V on, forward + backward")
    tokens = given.batch * given.length
    for name, seconds in rows.items():
        rate, ratio = tokens / seconds, seconds / rows["chunked"]
        print(f"{name:>12}: {1e3 * seconds:9.2f} ms {rate:9.0f} tokens/s {ratio:7.1f} x")
    flops = 3 * tokens * given.heads * (4 * CHUNK * DIM + 4 * DIM * DIM)
    share = flops / rows["chunked"] / product_rate(dtype=dtype, device=given.device)
    print(f"chunked runs its matrix products at {100 * share:.1f} % of the largest product's rate")


if __name__ == "__main__":
    main()
