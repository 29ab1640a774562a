"""Training tokens/s against Hugging Face Llama and Mamba2 of equal size, side by side.

    pip install ".[bench]"; python tests/benchmarks/training.py [--dtype float32] [--operations]

B 4, N 512, d 256, 4 layers, vocabulary 256, forward + backward + AdamW. The physical limit is the
rate of the model's own matrix products, measured one by one in the same run. On some processors
phase2's `linear` is faster than PyTorch's; a second Llama shows what that alone is worth.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from timing import best, machine
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from phase2 import create_phase2_model
from phase2.model import linear, linear_back
from phase2.training import parameter_groups

BATCH, LENGTH, D, LAYERS, VOCABULARY, CHUNK = 4, 512, 256, 4, 256, 64


def size(model):
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def llama(intermediate):
    """A Llama of the same width and depth; its size is set by the width of its MLP."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=4,
            intermediate_size=intermediate, use_cache=False, tie_word_embeddings=False,
        )
    )  # fmt: skip


def with_linear(model):
    """The same model with its products by phase2's `linear`."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.forward = functools.partial(linear, weight=layer.weight)
    return model


def mamba(state):
    """A Mamba2 of the same width with seven layers; its size is set by the size of its state."""
    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=7, num_heads=8,
            head_dim=64, state_size=state, n_groups=1, chunk_size=64, use_cache=False,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def nearest(make, choices, wanted):
    """Of the models `make` gives, the one whose size is nearest to the wanted one."""
    return min((make(choice) for choice in choices), key=lambda model: abs(size(model) - wanted))


def loss_of(model, text, dtype):
    """The loss of a model, in mixed precision unless dtype is float32."""
    half = dtype != torch.float32
    with torch.autocast("cpu", dtype=dtype) if half else contextlib.nullcontext():
        logits = model(text[:, :-1])
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    return F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())


def step(model, text, dtype):
    """A function that does one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run():
        loss = loss_of(model, text, dtype)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def products(model, dtype):
    """Seconds that the matrix products of a step take alone, of weights and of memories."""
    mixing = parameter_groups(model, 0.1)[0]["params"]
    total = 0.0
    for w in mixing:
        w = w.detach().to(dtype)
        x, y = (torch.randn(BATCH * LENGTH, n, dtype=dtype) for n in reversed(w.shape))
        total += best(lambda x=x, w=w, y=y: (linear(x, w), linear_back(y, x, w)), repeats=5)
    heads, dim = model.config.n_heads, D // model.config.n_heads
    a, b = torch.randn(2, BATCH * LENGTH // CHUNK * heads, CHUNK, dim, dtype=dtype)
    # four products of a chunk forward and eight backward, of the same size as C is D
    return total + LAYERS * 12 * best(lambda: a @ b.mT, repeats=20)


def models():
    """phase2 and its peers of equal size, functions by name."""
    wanted = size(create_phase2_model(preset="small"))
    llama_like = functools.partial(nearest, llama, range(512, 1024, 8), wanted)
    return {
        "phase2": lambda: create_phase2_model(preset="small"),
        "Llama": llama_like,
        "Llama with phase2's products": lambda: with_linear(llama_like()),
        "Mamba2": lambda: nearest(mamba, range(64, 136, 8), wanted),
    }


def resident(field):
    """MiB of this process: VmRSS is held now, VmHWM the most it has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def prepare(name, dtype):
    """What this process is for: `timed` then does a training step of one model."""
    global run, before
    torch.manual_seed(0)
    run = step(models()[name](), torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1)), dtype)
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest value so far
    before = resident("VmRSS")


def timed():
    """Seconds of one training step."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak():
    """MiB that training took at most, above what the process held before."""
    return resident("VmHWM") - before


def kept(model, dtype):
    """MiB that the forward pass keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}  # holding the tensors, so that no storage is counted twice

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = tensor
        return tensor

    text = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, text, dtype)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()) / 2**20


def train(names, dtype, repeats=20):
    """Seconds of the fastest step and MiB by model; each in a process of its own, in turns.

    A model that gives much memory back to the system makes the next one in its process pay for it.
    """
    spawn, times = multiprocessing.get_context("spawn"), {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        alone = {
            name: stack.enter_context(ProcessPoolExecutor(1, spawn, prepare, (name, dtype)))
            for name in names
        }
        for _ in range(repeats):
            for name in names:
                times[name].append(alone[name].submit(timed).result())
        memory = {name: alone[name].submit(peak).result() for name in names}
    return {name: min(found) for name, found in times.items()}, memory


def operations(rounds=25):
    """Print which operations the fastest of some profiled float32 steps of phase2 consists of."""
    prepare("phase2", torch.float32)
    steps = []
    for _ in range(rounds):
        with torch.profiler.profile() as seen:
            seconds = timed()
        steps.append((seconds, seen.key_averages()))
    seconds, found = min(steps, key=lambda step: step[0])
    print(f"one step of phase2 under the profiler, {1e3 * seconds:.0f} ms; by operation:")
    for event in sorted(found, key=lambda event: -event.self_cpu_time_total)[:20]:
        print(f"{event.self_cpu_time_total / 1e3:7.1f} ms, {event.count:4d} x {event.key}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--operations", action="store_true", help="only what a step consists of")
    settings = parser.parse_args()
    if settings.operations:
        return operations()
    dtype = getattr(torch, settings.dtype)
    built = {name: make() for name, make in models().items()}
    print(machine())
    print(f"B {BATCH}, N {LENGTH}, {dtype}, forward + backward + AdamW")
    seconds, memory = train(list(built), dtype)
    for name, model in built.items():
        now, most = seconds[name], memory[name]
        rate, ratio = BATCH * LENGTH / now, now / seconds["phase2"]
        print(
            f"{name:>28}: {size(model) / 1e6:.2f} M parameters, {1e3 * now:4.0f} ms a step, "
            f"{rate:5.0f} tokens/s, phase2 is {ratio:.2f} x as fast; {most:.0f} MiB at most, "
            f"{kept(model, dtype):.0f} MiB kept for the backward pass"
        )
    alone = products(built["phase2"], dtype)
    share = 100 * alone / seconds["phase2"]
    print(f"phase2's matrix products alone: {1e3 * alone:.0f} ms, {share:.0f} % of a step")


if __name__ == "__main__":
    main()
