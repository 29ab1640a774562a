"""Neural memories that are written by association, and that forget.

    >>> from phase2 import create_phase2_model
    >>> model = create_phase2_model(preset="small")

The modules follow the chapters of the book: `decay`, `memory`, `snr`, `resonance`, `stability` and
`consolidation` are the mechanisms, `model` is what they make together, and `training`, `inference`,
`diagnostics` and `checkpoints` are what one does with it.
"""

import importlib
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

MODULES = (
    *("decay", "memory", "snr", "resonance", "stability", "consolidation"),
    *("model", "training", "inference", "diagnostics", "checkpoints"),
)


if not TYPE_CHECKING:  # a checker would believe that any name exists

    def __getattr__(name):
        """Import a name when it is asked for: --help and shell completion need no torch."""
        if name in __all__:
            return getattr(importlib.import_module("phase2.model"), name)
        if name in MODULES:
            try:
                return importlib.import_module(f"phase2.{name}")
            except ImportError as error:  # it needs an extra; `help` and its like expect this
                raise AttributeError(str(error)) from error
        raise AttributeError(f"module 'phase2' has no attribute {name!r}")


def __dir__():
    return [*globals(), *__all__, *MODULES]
