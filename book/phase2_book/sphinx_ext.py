"""Docstrings as the book shows them: the equation one names, as in (eq-propagator), becomes a link.

A name that no chapter defines is a warning, and so fails the build.
"""

import re

_EQUATION = re.compile(r"\((eq-[\w-]+)\)")
_ABSOLUTE = re.compile(r"(?<![`\w])\|(\w+)\|")  # |V|, which reStructuredText would substitute


def link_equations(app, what, name, obj, options, lines):
    """Turn the equation names in a docstring's lines into references, and keep |V| as it is."""
    lines[:] = [_ABSOLUTE.sub(r"\|\1\|", _EQUATION.sub(r":eq:`\1`", line)) for line in lines]


def setup(app):
    """Sphinx calls this when it loads the extension."""
    app.connect("autodoc-process-docstring", link_equations)
    return {"parallel_read_safe": True}
