"""How the benchmarks measure: the best of several runs, side by side in one process."""

import platform
import time

import torch


def best(function, repeats=7):
    """Seconds of the fastest of several calls, after one that warms up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def in_turns(functions, repeats=7):
    """Seconds of the fastest of several calls of each function, by name.

    They take turns, so that a slow moment of the machine is shared by all.
    """
    times = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in times.items()}


def product_rate(n=1536, dtype=torch.float32):
    """FLOP/s of one large matrix product: what this machine can do at best."""
    a, b = torch.randn(2, n, n).to(dtype)
    return 2 * n**3 / best(lambda: a @ b)


def machine():
    """One line about what was measured on."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"largest matrix product {product_rate() / 1e9:.0f} GFLOP/s"
    )
