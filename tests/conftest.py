"""Every test starts from the same random state, and a failing property fails again."""

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # small tensors: more threads cost more than they bring

hypothesis.settings.register_profile("phase2", derandomize=True, deadline=None)
hypothesis.settings.load_profile("phase2")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
