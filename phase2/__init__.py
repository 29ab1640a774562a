"""Neural memories that are written by association, and that forget.

    >>> from phase2 import create_phase2_model
    >>> model = create_phase2_model(preset="small")

The modules follow the chapters of the book: `decay`, `memory`, `snr`, `resonance`, `stability` and
`consolidation` are the mechanisms, `model` is what they make together.
"""

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
