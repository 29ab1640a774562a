"""Neural memories that are written by association, and that forget.

    >>> from phase2 import create_phase2_model
    >>> model = create_phase2_model(preset="small")

The modules follow the chapters of the book: `decay`, `memory`, `snr`, `resonance`, `stability` and
`consolidation` are the mechanisms, `model` is what they make together.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phase2.model import (
        Phase2Block,
        Phase2Config,
        Phase2IntegratedModel,
        Phase2State,
        create_phase2_model,
    )

__version__ = "0.1.0"
__all__ = [
    "Phase2Block",
    "Phase2Config",
    "Phase2IntegratedModel",
    "Phase2State",
    "create_phase2_model",
]


def __getattr__(name):
    """Import what is asked for when it is asked for: help and completion do without torch."""
    if name in __all__:
        return getattr(importlib.import_module("phase2.model"), name)
    module = f"{__name__}.{name}"
    if name.startswith("_") or not importlib.util.find_spec(module):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(module)


def __dir__():
    return [*globals(), *__all__]
