"""Every test starts from the same random state, and a failing property fails again."""

import os
import shutil

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # small tensors: more threads cost more than they bring

hypothesis.settings.register_profile("phase2", derandomize=True, deadline=None)
hypothesis.settings.load_profile("phase2")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def missing(what: str) -> None:
    """Skip a test, or under CI fail it, for want of something."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        missing(f"no browser: install one of {', '.join(BROWSERS)}")
    playwright = pytest.importorskip("playwright.sync_api", exc_type=ImportError)
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=FLAGS)
        yield chromium
        chromium.close()
