"""The quick reference's snippets run as written, in order, and do what its text says.

Each snippet is followed by a check, a function of the namespace that all snippets of a section
share. What the reference leaves to its reader (sizes, loaders, a tokenizer, the user) is provided.
"""

import io
import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader

plt = pytest.importorskip("matplotlib.pyplot")

SECTIONS = {}


def snippet(section, code):
    """Decorate the check of a snippet: adds both to the section, in order."""

    def add(check):
        SECTIONS.setdefault(section, []).append((check.__name__, code, check))
        return check

    return add


def pairs(count, length=16, vocab_size=256):
    """A data set of bytes: (input_ids, target_ids), a token apart."""
    rows = torch.randint(0, vocab_size, (count, length + 1))
    return [(row[:-1], row[1:]) for row in rows]


def provided():
    """What the reference takes for granted."""
    import phase2

    return {
        "torch": torch, "nn": nn, "F": F, "np": np, "optim": optim, "plt": plt, "json": json,
        "DataLoader": DataLoader, "batch_size": 2, "seq_len": 24, "num_epochs": 2, "n_layers": 2,
        "num_sequences": 3, "max_length": 30, "train_loss": 1.5, "dataset": pairs(8),
        "train_loader": DataLoader(pairs(4), batch_size=2),
        "val_loader": DataLoader(pairs(2), batch_size=2),
        "test_loader": DataLoader(pairs(6), batch_size=2),
        "Phase2IntegratedModel": phase2.Phase2IntegratedModel,
        "create_phase2_model": phase2.create_phase2_model, "Phase2Config": phase2.Phase2Config,
    }  # fmt: skip


CREATE = """
from phase2 import Phase2IntegratedModel, create_phase2_model, Phase2Config
config = Phase2Config(
    vocab_size=1000,
    d_model=128,
    n_layers=2,
    base_decay=0.02,
    hebbian_eta=0.15,
)
model = create_phase2_model(config=config)
"""

FORWARD = "logits, diagnostics = model(input_ids, return_diagnostics=True)\n"

# 1. Basic use


@snippet(
    "basic",
    """
from phase2 import Phase2IntegratedModel, create_phase2_model, Phase2Config

model = Phase2IntegratedModel(
    vocab_size=1000,
    d_model=128,
    n_layers=2,
    n_seq=64,
)
""",
)
def direct(ns):
    assert len(ns["model"].blocks) == 2 and ns["model"].config.n_seq == 64


@snippet("basic", 'model = create_phase2_model(preset="small")')
def preset(ns):
    assert isinstance(ns["model"], ns["Phase2IntegratedModel"])


@snippet("basic", CREATE)
def custom(ns):
    config = ns["model"].config
    assert (config.base_decay, config.hebbian_eta, config.d_model) == (0.02, 0.15, 128)


@snippet(
    "basic",
    """
input_ids = torch.randint(0, 1000, (batch_size, seq_len))
logits = model(input_ids)
plain = logits
logits, diagnostics = model(input_ids, return_diagnostics=True)
""",
)
def forward(ns):
    assert ns["logits"].shape == (2, 24, 1000)
    assert torch.equal(ns["plain"], ns["logits"])
    names = {"gamma_values", "snr_stats", "resonance_info", "stability_metrics"}
    assert set(ns["diagnostics"]) == names
    assert all(len(ns["diagnostics"][name]) == 2 for name in names)


@snippet(
    "basic",
    """
for i, block in enumerate(model.blocks):
    if block.fast_weight_state is not None:
        norm = torch.norm(block.fast_weight_state).item()
        print(f"Layer {i}: ノルム={norm:.4f}")
before_reset = [block.fast_weight_state for block in model.blocks]
model.reset_state()
""",
)
def state(ns):
    assert ns["printed"].getvalue().count("ノルム=") == 2 and ns["norm"] > 0
    assert all(memory.shape == (2, 4, 32, 32) for memory in ns["before_reset"])
    assert all(block.fast_weight_state is None for block in ns["model"].blocks)


@snippet("basic", "stats = model.get_statistics()")
def statistics(ns):
    parameters = sum(p.numel() for p in ns["model"].parameters())
    stats = ns["stats"]
    assert stats["num_parameters"] == stats["num_trainable_parameters"] == parameters
    assert stats["num_layers"] == len(stats["block_stats"]) == 2


# 2. Training


@snippet(
    "training",
    """
from torch.utils.data import Dataset, DataLoader

class TinyTextDataset(Dataset):
    def __init__(self, vocab_size, seq_len, num_samples):
        self.data = [
            np.random.randint(0, vocab_size, size=seq_len + 1)
            for _ in range(num_samples)
        ]

    def __getitem__(self, idx):
        seq = self.data[idx]
        input_ids = torch.tensor(seq[:-1], dtype=torch.long)
        target_ids = torch.tensor(seq[1:], dtype=torch.long)
        return input_ids, target_ids

dataloader = DataLoader(dataset, batch_size=4, shuffle=True)
""",
)
def dataset(ns):
    inputs, targets = ns["TinyTextDataset"](1000, 9, 3)[2]
    assert torch.equal(inputs[1:], targets[:-1]) and len(inputs) == 9
    assert len(ns["dataloader"]) == 2


@snippet(
    "training",
    CREATE
    + """
num_epochs = 12
losses = []

import torch.optim as optim

optimizer = optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)

model.train()
for epoch in range(num_epochs):
    for input_ids, target_ids in dataloader:
        model.reset_state()
        logits = model(input_ids)
        loss = nn.functional.cross_entropy(
            logits.view(-1, logits.size(-1)),
            target_ids.view(-1)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
""",
)
def loop(ns):
    assert ns["losses"][0] == pytest.approx(np.log(1000), rel=0.05)
    assert ns["losses"][-1] < ns["losses"][0] - 1


@snippet(
    "training",
    """
logits, diagnostics = model(input_ids, return_diagnostics=True)

for layer_idx, gamma in enumerate(diagnostics['gamma_values']):
    if gamma is not None:
        print(f"Layer {layer_idx} Γ: {gamma.mean().item():.6f}")

for layer_idx, snr_stats in enumerate(diagnostics['snr_stats']):
    if snr_stats:
        print(f"Layer {layer_idx} SNR: {snr_stats['mean_snr']:.4f}")
""",
)
def logged(ns):
    text = ns["printed"].getvalue()
    assert text.count(" Γ: ") == 2 and text.count(" SNR: ") == 2


@snippet(
    "training",
    """
torch.save({
    'model_state_dict': model.state_dict(),
    'config': config.to_dict(),
    'train_loss': train_loss,
}, 'checkpoint.pt')
trained = model

checkpoint = torch.load('checkpoint.pt')
config = Phase2Config.from_dict(checkpoint['config'])
model = create_phase2_model(config=config)
model.load_state_dict(checkpoint['model_state_dict'])
""",
)
def checkpoint(ns):
    ids = torch.randint(0, 1000, (1, 20))
    assert torch.equal(ns["model"](ids), ns["trained"](ids))
    assert ns["checkpoint"]["train_loss"] == ns["train_loss"]


# 3. Inference

GREEDY = """
def greedy_decode(model, input_ids, max_length):
    model.eval()
    model.reset_state()

    generated = input_ids.clone()

    with torch.no_grad():
        for _ in range(max_length - input_ids.size(1)):
            logits = model(generated)
            next_token = torch.argmax(logits[:, -1, :], dim=-1, keepdim=True)
            generated = torch.cat([generated, next_token], dim=1)

    return generated
"""


def same_tokens(ns, prompt, **options):
    """What phase2.inference says after the prompt, with the random state of the snippet."""
    from phase2.inference import generate

    torch.manual_seed(0)
    return generate(ns["model"], prompt, ns["generated"].shape[1] - prompt.shape[1], **options)


@snippet(
    "inference",
    CREATE
    + GREEDY
    + """
prompt = torch.randint(0, 1000, (1, 10))
generated = greedy_decode(model, prompt, max_length=50)
""",
)
def greedy(ns):
    assert ns["generated"].shape == (1, 50)
    assert torch.equal(ns["generated"], same_tokens(ns, ns["prompt"]))


@snippet(
    "inference",
    """
def top_k_sampling(model, input_ids, max_length, k=10, temperature=1.0):
    model.eval()
    model.reset_state()

    generated = input_ids.clone()

    with torch.no_grad():
        for _ in range(max_length - input_ids.size(1)):
            logits = model(generated)
            next_token_logits = logits[:, -1, :] / temperature

            top_k_logits, top_k_indices = torch.topk(next_token_logits, k, dim=-1)
            probs = F.softmax(top_k_logits, dim=-1)

            sampled_indices = torch.multinomial(probs, num_samples=1)
            next_token = torch.gather(top_k_indices, 1, sampled_indices)

            generated = torch.cat([generated, next_token], dim=1)

    return generated

torch.manual_seed(0)
generated = top_k_sampling(model, prompt, max_length=50, k=10, temperature=1.0)
""",
)
def top_k(ns):
    assert ns["generated"].shape == (1, 50)
    assert torch.equal(ns["generated"], same_tokens(ns, ns["prompt"], temperature=1.0, top_k=10))
    for temperature in (0.5, 2.0):
        torch.manual_seed(0)
        expected = ns["top_k_sampling"](ns["model"], ns["prompt"], 50, 5, temperature)
        found = same_tokens(ns, ns["prompt"], temperature=temperature, top_k=5)
        assert torch.equal(found, expected)


@snippet(
    "inference",
    """
batch_prompts = torch.randint(0, 1000, (4, 10))
generated = greedy_decode(model, batch_prompts, max_length=50)
""",
)
def batch(ns):
    assert ns["generated"].shape == (4, 50)
    assert torch.equal(ns["generated"], same_tokens(ns, ns["batch_prompts"]))
    alone = ns["greedy_decode"](ns["model"], ns["batch_prompts"][2:3], 50)
    assert torch.equal(ns["generated"][2:3], alone)


@snippet(
    "inference",
    """
model.eval()
model.reset_state()

generated = prompt.clone()

with torch.no_grad():
    for step in range(max_length - prompt.size(1)):
        logits = model(generated)
        next_token = torch.argmax(logits[:, -1, :], dim=-1, keepdim=True)
        generated = torch.cat([generated, next_token], dim=1)

        print(f"{next_token.item()} ", end="", flush=True)
""",
)
def streaming(ns):
    from phase2.inference import stream

    said = [int(token) for token in stream(ns["model"], ns["prompt"], 20)]
    assert ns["printed"].getvalue().split() == [str(token) for token in said]


@snippet(
    "inference",
    """
model.eval()
total_loss = 0.0
total_tokens = 0

with torch.no_grad():
    for input_ids, target_ids in test_loader:
        model.reset_state()
        logits = model(input_ids)

        loss = F.cross_entropy(
            logits.view(-1, logits.size(-1)),
            target_ids.view(-1),
            reduction='sum'
        )

        total_loss += loss.item()
        total_tokens += target_ids.numel()

avg_loss = total_loss / total_tokens
perplexity = torch.exp(torch.tensor(avg_loss)).item()
""",
)
def perplexity(ns):
    from phase2.inference import evaluate

    rows = [torch.cat((x[0], y[0, -1:])) for x, y in DataLoader(ns["test_loader"].dataset)]
    losses = [evaluate(ns["model"], row)["loss"] for row in rows]
    assert ns["total_tokens"] == 6 * 16
    assert ns["avg_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert ns["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


# 4. Diagnostics


@snippet(
    "diagnostics",
    CREATE
    + """
import matplotlib.pyplot as plt

gamma_history = {i: [] for i in range(n_layers)}

for seq_idx in range(num_sequences):
    input_ids = torch.randint(0, 1000, (1, seq_len))
    model.reset_state()

    logits, diagnostics = model(input_ids, return_diagnostics=True)

    for layer_idx, gamma in enumerate(diagnostics['gamma_values']):
        if gamma is not None:
            gamma_history[layer_idx].append(gamma.mean().item())

plt.figure(figsize=(12, 6))
for layer_idx in range(n_layers):
    plt.plot(gamma_history[layer_idx], marker='o', label=f'Layer {layer_idx}')
plt.xlabel('Sequence Index')
plt.ylabel('Γ (Decay Rate)')
plt.legend()
plt.savefig('gamma_monitoring.png')
""",
)
def gamma(ns):
    values = np.array(list(ns["gamma_history"].values()))
    assert values.shape == (2, 3) and (values > ns["config"].base_decay).all()
    assert is_picture("gamma_monitoring.png")


@snippet(
    "diagnostics",
    """
snr_history = {i: {'mean_snr': [], 'std_snr': []} for i in range(n_layers)}

for seq_idx in range(num_sequences):
    input_ids = torch.randint(0, 1000, (1, seq_len))
    model.reset_state()

    logits, diagnostics = model(input_ids, return_diagnostics=True)

    for layer_idx, snr_stats in enumerate(diagnostics['snr_stats']):
        if snr_stats:
            snr_history[layer_idx]['mean_snr'].append(snr_stats['mean_snr'])
            snr_history[layer_idx]['std_snr'].append(snr_stats['std_snr'])

for layer_idx in range(n_layers):
    mean_snr = np.array(snr_history[layer_idx]['mean_snr']).mean()
    print(f"Layer {layer_idx} 平均SNR: {mean_snr:.4f}")
""",
)
def snr(ns):
    values = np.array([list(layer.values()) for layer in ns["snr_history"].values()])
    assert values.shape == (2, 2, 3) and (values > 0).all() and np.isfinite(values).all()
    assert ns["printed"].getvalue().count("平均SNR: ") == 2


@snippet(
    "diagnostics",
    """
input_ids = torch.randint(0, 1000, (1, seq_len))
model.reset_state()

logits, diagnostics = model(input_ids, return_diagnostics=True)

for layer_idx, resonance_info in enumerate(diagnostics['resonance_info']):
    if resonance_info and 'diag_energy' in resonance_info:
        diag_energy = resonance_info['diag_energy'].cpu().numpy()

        plt.figure(figsize=(10, 6))
        plt.imshow(diag_energy.mean(axis=0), aspect='auto', cmap='viridis')
        plt.colorbar()
        plt.title(f'Layer {layer_idx} 共鳴エネルギー')
        plt.savefig(f'resonance_layer_{layer_idx}.png')
""",
)
def resonance(ns):
    assert ns["diag_energy"].shape == (1, 4, 32) and ns["diag_energy"].max() > 0
    assert is_picture("resonance_layer_0.png") and is_picture("resonance_layer_1.png")


@snippet(
    "diagnostics",
    """
stability_history = {i: {'energy': [], 'dE_dt': []} for i in range(n_layers)}

for seq_idx in range(num_sequences):
    input_ids = torch.randint(0, 1000, (1, seq_len))
    model.reset_state()

    logits, diagnostics = model(input_ids, return_diagnostics=True)

    for layer_idx, stability in enumerate(diagnostics['stability_metrics']):
        if stability:
            if 'energy' in stability:
                stability_history[layer_idx]['energy'].append(stability['energy'])
            if 'dE_dt' in stability:
                stability_history[layer_idx]['dE_dt'].append(stability['dE_dt'])

for layer_idx in range(n_layers):
    dE_dts = np.array(stability_history[layer_idx]['dE_dt'])
    stable_ratio = (dE_dts <= 0).mean()
    print(f"Layer {layer_idx} 安定率: {stable_ratio * 100:.1f}%")
""",
)
def stability(ns):
    for layer in ns["stability_history"].values():
        assert len(layer["energy"]) == len(layer["dE_dt"]) == 3 and min(layer["energy"]) > 0
    assert ns["printed"].getvalue().count("安定率: ") == 2
    assert ns["stable_ratio"] == 0  # a memory that starts empty can only have risen


@snippet(
    "diagnostics",
    """
import json

input_ids = torch.randint(0, 1000, (2, seq_len))
model.reset_state()

logits, diagnostics = model(input_ids, return_diagnostics=True)
model_stats = model.get_statistics()

report = {
    'model_config': config.to_dict(),
    'model_statistics': {
        'num_parameters': model_stats['num_parameters'],
        'num_layers': model_stats['num_layers'],
    },
    'diagnostics': {
        'gamma_values': [gamma.mean().item() for gamma in diagnostics['gamma_values']],
        'snr_stats': [dict(stats) for stats in diagnostics['snr_stats']],
        'resonance_info': [
            {'diag_energy': info['diag_energy'].tolist()} for info in diagnostics['resonance_info']
        ],
        'stability_metrics': [dict(metrics) for metrics in diagnostics['stability_metrics']],
    },
}

with open('comprehensive_report.json', 'w') as f:
    json.dump(report, f, indent=2)
""",
)
def report(ns):
    from phase2.diagnostics import diagnose

    with open("comprehensive_report.json") as file:
        written = json.load(file)
    assert written == ns["report"]
    ours = diagnose(ns["model"], torch.randint(0, 1000, (50,)))
    ours.to_json("ours.json")
    with open("ours.json") as file:
        ours = json.load(file)
    assert written.keys() <= ours.keys()
    for part in written:
        assert written[part].keys() <= ours[part].keys()
    assert ours["model_config"] == written["model_config"]
    assert ours["model_statistics"] == written["model_statistics"]


# Patterns


@snippet(
    "patterns",
    """
model = create_phase2_model(preset="base")
optimizer = optim.AdamW(model.parameters(), lr=1e-3)
num_epochs = 1

for epoch in range(num_epochs):
    model.train()
    for input_ids, target_ids in train_loader:
        model.reset_state()
        logits = model(input_ids)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), target_ids.view(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():
        for input_ids, target_ids in val_loader:
            model.reset_state()
            logits = model(input_ids)
""",
)
def train_and_evaluate(ns):
    assert ns["model"].config.d_model == 512 and not ns["model"].training
    assert all(torch.isfinite(p.grad).all() for p in ns["model"].parameters())
    assert ns["logits"].isfinite().all() and not ns["logits"].requires_grad


@snippet(
    "patterns",
    CREATE
    + """
for epoch in range(num_epochs):
    model.train()

    for batch_idx, (input_ids, target_ids) in enumerate(train_loader):
        model.reset_state()

        if batch_idx == 0:
            logits, diagnostics = model(input_ids, return_diagnostics=True)
        else:
            logits = model(input_ids)
""",
)
def diagnosed_training(ns):
    assert ns["logits"].requires_grad
    assert len(ns["diagnostics"]["gamma_values"]) == 2


@snippet(
    "patterns",
    CREATE
    + GREEDY
    + """
model.eval()
model.reset_state()

while True:
    user_input = input("プロンプト: ")
    if user_input == "quit":
        break

    input_ids = tokenize(user_input)

    generated = greedy_decode(model, input_ids, max_length=100)

    output_text = detokenize(generated)
    print(f"生成: {output_text}")
""",
)
def interactive(ns):
    said = ns["printed"].getvalue()
    assert said.count("生成: ") == 2 and said.startswith("生成: hello")
    assert ns["generated"].shape == (1, 100)


# Troubleshooting


@snippet(
    "troubleshooting",
    """
dataloader = DataLoader(dataset, batch_size=2)
config = Phase2Config(n_seq=512)
model = create_phase2_model(preset="small")
""",
)
def less_memory(ns):
    assert len(next(iter(ns["dataloader"]))[0]) == 2
    assert ns["config"].n_seq == 512
    count = ns["model"].get_statistics()["num_parameters"]
    base = ns["create_phase2_model"](preset="base").get_statistics()["num_parameters"]
    assert count < base / 4
    full, half_batch, half_length = (kept_for_backward(ns, *size) for size in SIZES)
    assert half_batch < 0.6 * full and half_length < 0.6 * full


@snippet(
    "troubleshooting",
    """
config = Phase2Config(base_decay=0.005)
""",
)
def overdamped(ns):
    Phase2Config = ns["Phase2Config"]
    for config in (Phase2Config(base_decay=0.01), ns["config"]):
        assert not warnings_of(tiny(ns, base_decay=config.base_decay))
    assert "Overdamped system detected: Γ/|V| = " in warnings_of(tiny(ns, base_decay=0.4))
    assert not warnings_of(tiny(ns, base_decay=0.2))  # half of it, as the reference advises


@snippet(
    "troubleshooting",
    """
config = Phase2Config(gamma_adjust_rate=0.02)
optimizer = optim.AdamW(model.parameters(), lr=5e-4)
""",
)
def unstable(ns):
    assert ns["optimizer"].param_groups[0]["lr"] == 5e-4
    rate = ns["config"].gamma_adjust_rate
    assert "Lyapunov stability violated" in warnings_of(driven(ns, gamma_adjust_rate=rate / 2))
    assert not warnings_of(driven(ns, gamma_adjust_rate=rate))  # twice it, as advised


SIZES = [(4, 64), (2, 64), (4, 32)]  # batch, length


def kept_for_backward(ns, batch, length):
    """Bytes that one forward pass of a small model keeps for the backward pass."""
    sizes = {}

    def pack(x):
        sizes[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    model = ns["create_phase2_model"](d_model=64, n_layers=1, n_heads=2)
    weights = {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = model(torch.randint(0, 256, (batch, length)))
    assert logits.requires_grad
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def tiny(ns, **values):
    return ns["create_phase2_model"](d_model=64, n_layers=2, **values)


def driven(ns, **values):
    """One slow memory that does not turn: writes that are alike add up in it."""
    model = ns["create_phase2_model"](
        d_model=32, n_layers=1, n_heads=1, consolidate_every=32, **values
    )
    with torch.no_grad():
        linear = model.blocks[0].potential.linear
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor([0.0, -9.0]))  # V = 0, Γ near its floor
    model.warned.add("overdamped")  # which V = 0 is, too
    return model


def warnings_of(model):
    """What a model warns of while it reads the same token over and over."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.zeros(1, 128, dtype=torch.long), return_diagnostics=True)
    return " ".join(str(warning.message) for warning in caught)


def is_picture(name):
    with open(name, "rb") as file:
        return file.read(8) == b"\x89PNG\r\n\x1a\n"


@pytest.mark.filterwarnings("ignore:Glyph")  # Matplotlib's own font has no Japanese
@pytest.mark.parametrize("section", SECTIONS)
def test_snippets(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    lines = iter(["hello", "Γ", "quit"])
    ns = provided() | {
        "input": lambda ask: next(lines),
        "tokenize": lambda text: torch.tensor([list(text.encode())]),
        "detokenize": lambda ids: "".join(map(chr, ids[0].tolist())),
    }
    ns["print"] = lambda *values, file=None, **kw: print(*values, file=ns["printed"], **kw)
    for name, code, check in SECTIONS[section]:
        ns["printed"] = io.StringIO()
        exec(compile(code, f"<{section}: {name}>", "exec"), ns)
        check(ns)
    plt.close("all")
