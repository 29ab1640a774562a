"""Docstrings as the book shows them: the equation one names, as in (eq-propagator), becomes a link.

A name that no chapter defines is a warning, and so fails the build.
"""

import re
from collections import namedtuple

_EQUATION = re.compile(r"\((eq-[\w-]+)\)")
_ABSOLUTE = re.compile(r"(?<![`\w])\|(\w+)\|")  # |V|, which reStructuredText would substitute


def link_equations(app, what, name, obj, options, lines):
    """Turn the equation names in a docstring's lines into references, and keep |V| as it is."""
    lines[:] = [_ABSOLUTE.sub(r"\|\1\|", _EQUATION.sub(r":eq:`\1`", line)) for line in lines]


_FIELD = type(namedtuple("Pair", "a b").a)


def skip_field(app, what, name, obj, skip, options):
    """Leave out the fields of a named tuple: its own docstring says what they are."""
    return True if isinstance(obj, _FIELD) else None


def setup(app):
    """Sphinx calls this when it loads the extension."""
    app.connect("autodoc-process-docstring", link_equations)
    app.connect("autodoc-skip-member", skip_field)
    return {"parallel_read_safe": True}
