"""Two processes do what one does."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from phase2.model import create_phase2_model
from phase2.training import text_data, train

pytest.importorskip("accelerate")

TEXT = "".join(f"{n} squared is {n * n}; " for n in range(700))
MODEL = {"d_model": 16, "n_layers": 2, "n_heads": 2, "n_seq": 24, "consolidate_every": 16}
RUN = {"steps": 12, "learning_rate": 5e-3, "warmup": 4, "evaluate_every": 5, "save_every": 8}
RUN |= {"evaluate_windows": 7, "log_every": 3, "progress": False}

SCRIPT = """
    import json, os, shutil, sys, torch
    from phase2.model import create_phase2_model
    from phase2.training import text_data, train

    arguments = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_phase2_model(**arguments["model"])
    data = text_data(arguments["text"])
    out = arguments["out"]

    def keep(entry):
        if entry["step"] == 9 and os.environ["RANK"] == "0":  # the last save was after step 8
            shutil.copy(f"{out}/training.pt", f"{out}/half.pt")

    train(model, data, **arguments["run"], out=out, on_step=keep)
"""


def test_two_processes_equal_one(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "run"
    script.write_text(textwrap.dedent(SCRIPT))
    arguments = {"model": MODEL, "text": TEXT, "run": RUN | {"accumulate": 2}, "out": str(out)}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(script), json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    torch.manual_seed(0)
    model, data = create_phase2_model(**MODEL), text_data(TEXT)
    alone = train(model, data, **RUN)
    together = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in together] == list(range(1, 13))
    assert [entry.keys() for entry in together] == [entry.keys() for entry in alone]
    for one, two in zip(alone, together, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-4)
        assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=5e-3)
        if "held_out" in one:
            assert one["held_out"] == pytest.approx(two["held_out"], rel=2e-4)
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.3  # it did learn

    saved = torch.load(out / "training.pt")
    assert len(saved["rng"]) == 2 and saved["step"] == 12
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved["best"]["weights"][name], weight, atol=3e-3, rtol=0)

    (out / "half.pt").replace(out / "training.pt")  # a run of two goes on, after step 8, as one
    choice = RUN | {"accumulate": 2}
    again = train(create_phase2_model(**MODEL), data, **choice, out=out, resume=True)
    assert again[:8] == together[:8] and len(again) == 12
    for one, two in zip(again[8:], together[8:], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-4)
