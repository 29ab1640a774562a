"""What looking costs: one call with return_diagnostics against one without.

    python tests/benchmarks/diagnostics.py [--threads 1] [--rounds 15]

Small preset, 4 rows of 512 tokens: a training step (forward, backward), a forward pass, and one
token of decoding, as most are and one at which memories are consolidated. With and without are
timed alternately, and the fastest of the rounds is compared: what else the machine does can only
add.
Then the time of each part of the diagnostics, alone.
"""

import argparse
import functools

import torch
import torch.nn.functional as F
from timing import best, in_turns

from phase2.model import create_phase2_model, diagnose_layers, stability_of, watch
from phase2.resonance import resonance_info
from phase2.snr import snr_stats


def cases(model, ids):
    targets = ids.roll(-1, 1)
    with torch.no_grad():
        _, due = model(ids[:1], return_state=True)  # the next token begins with a consolidation
        _, ordinary = model(ids[:1, :-10], return_state=True)

    def training(look):
        result = model(ids, return_diagnostics=look)
        logits = result[0] if look else result
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()

    @torch.no_grad()
    def forward(look):
        model(ids, return_diagnostics=look)

    @torch.no_grad()
    def decoding(look, state):
        model(ids[:1, :1], state=state, return_diagnostics=look)

    return {
        "training step": training,
        "forward": forward,
        "one token": functools.partial(decoding, state=ordinary),
        "one that consolidates": functools.partial(decoding, state=due),
    }


@torch.no_grad()
def parts(model, ids):
    """What a look consists of, each part for all layers."""
    _, seen, state = model(ids, return_diagnostics=True, return_state=True)
    gammas, elapsed = seen["gamma_values"], torch.ones(len(ids))
    memories = [layer.fast_weights for layer in state.layers]
    return {
        "all of it": lambda: diagnose_layers(model, state, gammas),
        "SNR": lambda: [snr_stats(w, model.config.snr_threshold) for w in memories],
        "resonance": lambda: [resonance_info(w, b.basis) for w, b in zip(memories, model.blocks)],
        "stability": lambda: [stability_of(s, elapsed) for s in state.layers],
        "warnings": lambda: watch(model, gammas, gammas, state),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rounds = options.rounds
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, ids = create_phase2_model(preset="small"), torch.randint(0, 256, (4, 512))
    print(f"{'':22s} {'off, ms':>9} {'on, ms':>9} {'overhead':>9}")
    for name, call in cases(model, ids).items():
        times = in_turns(
            {look: lambda look=look, call=call: call(look) for look in (False, True)}, rounds
        )
        off, on = times.values()
        print(f"{name:22s} {1000 * off:9.2f} {1000 * on:9.2f} {100 * (on / off - 1):+8.1f} %")
    for name, call in parts(model, ids).items():
        print(f"  {name:20s} {'':9} {1000 * best(call, rounds):9.2f}")


if __name__ == "__main__":
    main()
