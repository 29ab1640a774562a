"""What a token costs when decoding, early and late in a text.

    python tests/benchmarks/decoding.py [--positions 100 10000 100000]

The state is a few matrices a layer; nothing in it grows with the length that was read.
"""

import argparse

import torch
from timing import machine

from phase2 import create_phase2_model

WINDOW = 200  # tokens timed at each position; an odd number of consolidations may fall into it


def main():
    import statistics
    import time

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    positions = parser.parse_args().positions
    torch.manual_seed(0)
    model = create_phase2_model(preset="small").eval()
    print(machine())
    token, state, read = torch.zeros(1, 1, dtype=torch.long), None, 0
    first = None
    with torch.no_grad():
        for position in positions:
            while read < position:  # read up to there, in pieces
                piece = min(4096, position - read)
                text = torch.randint(0, 256, (1, piece))
                _, state = model(text, state=state, return_state=True)
                read += piece
            times = []
            for _ in range(WINDOW):
                start = time.perf_counter()
                logits, state = model(token, state=state, return_state=True)
                token = logits[:, -1:].argmax(-1)
                times.append(time.perf_counter() - start)
            read += WINDOW
            typical = statistics.median(times)
            first = first or typical
            size = sum(x.numel() for layer in state.layers for x in layer)
            print(
                f"token {position:>7}: {1e3 * typical:.2f} ms ({typical / first:.2f} x), "
                f"state of {size} numbers"
            )


if __name__ == "__main__":
    main()
