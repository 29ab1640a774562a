"""What learns better: the small model as it is, with one thing changed, or another architecture?

    python tests/benchmarks/learning.py [--variants full ...] [--seeds 0 1 2] [--device cuda]

All have the same number of parameters (Llama and Mamba2 within 2 %; they need transformers) and
read the same tokens: the sources of the standard library, every tenth file held out. Printed: bits
per byte on held-out text, read from an empty memory in rows of 4096 bytes and in rows as long as
in training, and for the model as it is, what its mechanisms do after training.
"""

import argparse
import contextlib
import math
import statistics
import sysconfig
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

import phase2.model
from phase2 import create_phase2_model
from phase2.consolidation import remember
from phase2.decay import DecayPotential, decay_rate, half_life
from phase2.model import blend, feed_forward, learning_rate, look_back

LENGTH, ROW = 512, 4096


def without_memory(q, k, v, gamma, potential, eta, state, *_):
    """In the place of the memory: a token's own value."""
    return v, gamma, state


def without_rotation(q, k, v, gamma, potential, *rest):
    """The memory with V = 0."""
    return remember(q, k, v, gamma, 0 * potential, *rest)


def own_potential(self, x):
    """V = w x + b in radians per token, in the place of one that is measured by Γ."""
    potential, raw = self.linear(x).chunk(2, dim=-1)
    return potential, decay_rate(raw, self.base_decay)


def own_rates(self, x):
    """V and Γ of a head, learned, but the same for all tokens."""
    turns, raw = self.linear.bias.expand(*x.shape[:-1], -1).chunk(2, dim=-1)
    gamma = decay_rate(raw, self.base_decay)
    return turns * (gamma - self.base_decay), gamma


def either_sign(block, h):
    """Queries, keys and values that are not rectified."""
    return block.qkv(h).unflatten(-1, (3, *block.key_mix.shape)).unbind(-3)


def gelu_network(x, mix, up, down, last, _=None):
    """The network with GELU in the place of the squared ReLU."""
    return F.linear(F.gelu(F.linear(blend(x, mix, last), up)), down), x[:, -1]


def own_input(x, mix, *rest):
    """The network without looking back."""
    return feed_forward(x, 0 * mix, *rest)


def own_keys(k, mix, *rest):
    """Keys that do not look back."""
    return look_back(k, 0 * mix, *rest)


VARIANTS = {  # fields of the configuration, and what is replaced by what
    "full": ({}, None),
    "without memory": ({}, (phase2.model, "remember", without_memory)),
    "never consolidated": ({"consolidate_every": 10**9}, None),
    "without selection": ({"snr_gamma_boost": 0.0}, None),
    "without resonance": ({"resonance_strength": 0.0}, None),
    "without controller": ({"gamma_adjust_rate": 0.0}, None),
    "without rotation": ({}, (phase2.model, "remember", without_rotation)),
    "V with its own unit": ({}, (DecayPotential, "forward", own_potential)),
    "rates that see no token": ({}, (DecayPotential, "forward", own_rates)),
    "q, k, v of either sign": ({}, (phase2.model, "project", either_sign)),
    "keys do not look back": ({}, (phase2.model, "look_back", own_keys)),
    "network does not look back": ({}, (phase2.model, "feed_forward", own_input)),
    "GELU": ({}, (phase2.model, "feed_forward", gelu_network)),
}


PEERS = ["Llama", "Mamba2"]


class Peer(torch.nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, name):
        super().__init__()
        from training import models  # needs transformers

        self.model = models()[name]()

    def forward(self, ids):
        return self.model(ids).logits


def new_model(name):
    """A model; V starts the same in all variants."""
    if name in PEERS:
        return Peer(name)
    model = create_phase2_model(preset="small", **VARIANTS[name][0])
    if name == "V with its own unit":
        for block in model.blocks:
            layer = block.potential
            with torch.no_grad():  # from b_V to V at x = 0
                turns, raw = layer.linear.bias.chunk(2)
                turns *= F.softplus(raw)
    return model


def texts():
    """Training and held-out text: the modules of the standard library, as bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [[], []]
    for i, file in enumerate(files):
        parts[i % 10 == 9].append(file.read_bytes())
    return [torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts]


def learn(model, train, settings, seed):
    """AdamW, 5 % warm-up and a cosine; every variant draws the same windows."""
    optimizer = torch.optim.AdamW(model.parameters(), settings.peak, (0.9, 0.95), weight_decay=0.1)
    steps, generator = settings.steps, torch.Generator().manual_seed(seed)

    def rate(step):
        return min(20 * (step + 1) / steps, 0.525 + 0.475 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for _ in range(steps):
        start = torch.randint(0, len(train) - LENGTH, (settings.batch, 1), generator=generator)
        text = train[start.to(train.device) + torch.arange(LENGTH + 1, device=train.device)].long()
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step()


@torch.no_grad()
def bits_per_byte(model, text, length, rows=64):
    """ROW held-out bytes at each of `rows` places, in rows of `length` from an empty memory."""
    starts = torch.linspace(0, len(text) - ROW - 1, rows).long()
    total = 0.0
    for start in starts.tolist():
        bytes_in, targets = (text[start + i :][:ROW].long().view(-1, length) for i in (0, 1))
        total += F.cross_entropy(model(bytes_in).flatten(0, 1), targets.flatten()).item()
    return total / rows / math.log(2)


@torch.no_grad()
def alive(model, text):
    """What the mechanisms do while the model reads a row: a line for each layer."""
    etas, asked, hooks = [], [], []
    for block in model.blocks:
        hooks.append(block.eta.register_forward_hook(lambda *x: etas.append(x[2][0])))
        hooks.append(block.potential.register_forward_hook(lambda *x: asked.append(x[2][1])))
    _, found = model(text[None, :ROW].long(), return_diagnostics=True)
    for hook in hooks:
        hook.remove()
    for layer, raw in enumerate(etas):
        gamma = found["gamma_values"][layer]
        lives = half_life(asked[layer]).median(1).values[0]
        raised = (gamma > asked[layer])[:, model.config.consolidate_every :].float().mean((0, 1))
        early, late = learning_rate(raw, model.config.hebbian_eta).chunk(2)
        heads = ", ".join(
            f"{life:.0f} ({100 * share:.0f} %)" for life, share in sorted(zip(lives, raised))
        )
        print(
            f"  layer {layer}: half-lives in tokens, and how often the controller acts: {heads}; "
            f"selected share {found['snr_stats'][layer]['selected_share']:.2f}, mean mask "
            f"{found['resonance_info'][layer]['mask'].mean():.2f}, "
            f"η {early.mean():.3f} in the first half of a row and {late.mean():.3f} in the second"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = [*VARIANTS, *PEERS]
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=known)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peak", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--device", default="cpu")
    settings = parser.parse_args()
    train, held_out = (x.to(settings.device) for x in texts())
    read = settings.steps * settings.batch * LENGTH / 1e6
    print(f"{len(train) / 1e6:.1f} MB of text, {read:.1f} M tokens, torch {torch.__version__}")
    for name in settings.variants:
        found, start = {ROW: [], LENGTH: []}, time.perf_counter()
        for seed in settings.seeds:
            torch.manual_seed(seed)
            model = new_model(name).to(settings.device)
            replaced = VARIANTS[name][1] if name in VARIANTS else None
            with mock.patch.object(*replaced) if replaced else contextlib.nullcontext():
                learn(model, train, settings, seed)
                for length, bits in found.items():
                    bits.append(bits_per_byte(model, held_out, length))
            if name == "full":
                alive(model, held_out)
        minutes = (time.perf_counter() - start) / 60
        for length, bits in found.items():
            spread = statistics.stdev(bits) if len(bits) > 1 else math.nan
            each = ", ".join(f"{x:.3f}" for x in bits)
            print(
                f"{name:>23}: {statistics.mean(bits):.3f} ± {spread:.3f} bits per byte ({each}) "
                f"in rows of {length}, {minutes:.0f} min"
            )


if __name__ == "__main__":
    main()
