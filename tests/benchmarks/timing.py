"""How the benchmarks measure: the best of several runs, what is compared taking turns."""

import platform
import time

import torch

from phase2.model import linear


def settle():
    """Wait until an accelerator has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def best(function, repeats=7):
    """Seconds of the fastest of several calls, after one that warms up."""
    return in_turns({"it": function}, repeats)["it"]


def in_turns(functions, repeats=7):
    """Seconds of the fastest of several calls of each function, by name.

    They take turns, so that a slow moment of the machine is shared by all.
    """
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            settle()
            start = time.perf_counter()
            function()
            settle()
            times[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in times.items()}


def product_rate(dtype=torch.float32, device="cpu"):
    """FLOP/s of one large matrix product: what this machine can do at best."""
    n = 1536 if device == "cpu" else 8192
    a, b = torch.randn(2, n, n).to(device, dtype)
    return 2 * n**3 / best(lambda: linear(a, b))


def machine(device="cpu", dtype=torch.float32):
    """One line about what was measured on."""
    what = f"{platform.machine()}, {torch.get_num_threads()} threads"
    what = what if device == "cpu" else torch.cuda.get_device_name()
    rate = product_rate(dtype, device) / 1e9
    return f"{what}, torch {torch.__version__}, largest matrix product {rate:.0f} GFLOP/s"
