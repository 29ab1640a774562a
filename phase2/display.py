"""Figures that read well, and sliders that move with or without a kernel.

Written by hand, for the notebooks; nothing else in the package imports it. Matplotlib and
ipywidgets come with the extra ``book`` and are imported on first use.
"""

from __future__ import annotations

import base64
import importlib
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from json import dumps
from string import Formatter
from typing import Any

__all__ = ["Explorable", "Picture", "explore", "show", "use_style"]

MAX_FRAMES = 64
MAX_BYTES = 1_500_000  # of the static page, all frames together

DOTS_PER_INCH = 144
CSS_PIXELS_PER_INCH = 100  # 1.44 image dots for each: sharp on a dense screen, small as a file
PALETTE = 128  # colors of a saved picture: a third of the bytes of true color

INK = "#333a42"
STYLE = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": DOTS_PER_INCH,
    "figure.facecolor": "white",  # a card, in a dark page too: Okabe–Ito colors need a light ground
    "figure.constrained_layout.use": True,
    "savefig.dpi": DOTS_PER_INCH,
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",  # ships with Matplotlib: the same letters on every machine
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a929b",
    "xtick.color": "#8a929b",
    "ytick.color": "#8a929b",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ec",
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.0,
    "image.cmap": "viridis",
}
# Okabe and Ito's palette, darkest contrasts first; its yellow is left out, too faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333A42")

# One handler, on the box the sliders are in: the picture's number is the sliders' positions read as
# digits, the first slider the most significant.
_ON_INPUT = """
const box = event.currentTarget, picture = box.querySelector('img');
let frame = 0;
for (const slider of box.querySelectorAll('input')) {
  const labels = JSON.parse(slider.dataset.labels), label = labels[slider.value];
  frame = frame * labels.length + Number(slider.value);
  slider.setAttribute('aria-valuetext', label);
  slider.nextElementSibling.textContent = label;
}
picture.src = box.dataset.frames.split(' ')[frame];
picture.alt = JSON.parse(box.dataset.alts)[frame];
"""


def use_style() -> None:
    """Set Matplotlib's defaults for the book: size, type, grid and a color-blind-safe cycle.

    Raises:
        ImportError: if Matplotlib is missing.
    """
    cycler = _require("matplotlib").cycler
    _require("matplotlib.pyplot").rcParams.update(STYLE | {"axes.prop_cycle": cycler(color=COLORS)})


class Picture:
    """A figure frozen as a PNG, with the sentence that stands for it where it cannot be seen.

    Args:
        figure: a Matplotlib figure; it is closed.
        alt: what the picture shows, in words.

    Raises:
        TypeError: if ``figure`` is no Matplotlib figure.
        ValueError: if ``alt`` is empty.
    """

    def __init__(self, figure: Any, alt: str):
        if not isinstance(figure, _require("matplotlib.figure").Figure):
            raise TypeError(f"figure must be a matplotlib Figure, got {type(figure).__name__}")
        if not alt.strip():
            raise ValueError("alt must say what the picture shows, got an empty text")
        self.alt = alt
        self.width, self.height = (round(CSS_PIXELS_PER_INCH * x) for x in figure.get_size_inches())
        self.uri = "data:image/png;base64," + base64.b64encode(_png(figure)).decode()

    def __repr__(self) -> str:
        return f"Picture({self.alt!r})"

    def _repr_html_(self) -> str:
        return (
            f'<img class="phase2-picture" src="{self.uri}" alt="{escape(self.alt)}" '
            f'width="{self.width}" height="{self.height}" '
            'style="max-width: 100%; height: auto">'
        )


def show(figure: Any, alt: str) -> None:
    """Display a figure with its alternative text, and close it.

    Args:
        figure: a Matplotlib figure.
        alt: what the picture shows, in words, for a reader who cannot see it.

    Raises:
        ImportError: if Matplotlib or IPython is missing.
        TypeError: if ``figure`` is no Matplotlib figure.
        ValueError: if ``alt`` is empty.
    """
    _require("IPython.display").display(Picture(figure, alt))


def explore(
    draw: Callable[..., Any],
    /,
    *,
    alt: str,
    start: Mapping[str, Any] | None = None,
    **values: Sequence[Any],
) -> Explorable:
    """A figure with sliders: live in a kernel, and just as movable in a static page.

    Every combination of the values is drawn once, here, so that a page needs no kernel. With a
    kernel, moving a slider calls ``draw`` again.

    Args:
        draw: ``draw(**values)`` returns a Matplotlib figure that depends on its arguments alone.
        alt: what the picture shows, in words; ``{name}`` stands for the value of that slider, and
            every slider must be named.
        start: where sliders stand at first, by name; the middle of the list if not given.
        **values: a list of values for each slider.

    Returns:
        An object to leave as the last line of a cell.

    Raises:
        ImportError: if Matplotlib is missing.
        TypeError: if ``draw`` returns something else than a figure.
        ValueError: if there is no slider, a list is empty, ``alt`` or ``start`` do not fit the
            sliders, or the pictures are more than 64 or larger than 1.5 MB together.
    """
    return Explorable(draw, alt, dict(start or {}), {name: list(v) for name, v in values.items()})


class Explorable:
    """What :func:`explore` returns: every frame of a figure, and the sliders that choose one."""

    def __init__(self, draw: Callable, alt: str, start: dict[str, Any], values: dict[str, list]):
        _check(alt, start, values)
        self.draw, self.alt, self.values = draw, alt, values
        self.start = {
            name: v.index(start[name]) if name in start else len(v) // 2
            for name, v in values.items()
        }
        positions = itertools.product(*(range(len(v)) for v in values.values()))
        self.frames = {p: self._picture(p) for p in positions}
        size = sum(len(frame.uri) for frame in self.frames.values())
        if size > MAX_BYTES:
            raise ValueError(
                f"{len(self.frames)} pictures take {size / 1e6:.1f} MB, allowed are "
                f"{MAX_BYTES / 1e6:.1f} MB: give fewer values or draw a simpler figure"
            )

    def _picture(self, position: Sequence[int]) -> Picture:
        chosen = {name: v[i] for (name, v), i in zip(self.values.items(), position, strict=True)}
        alt = self.alt.format(**{name: _label(value) for name, value in chosen.items()})
        return Picture(self.draw(**chosen), alt)

    def __repr__(self) -> str:
        ranges = (f"{n}: {_label(v[0])} … {_label(v[-1])}" for n, v in self.values.items())
        return f"explore({', '.join(ranges)}; {len(self.frames)} pictures)"

    def _repr_html_(self) -> str:
        frames = self.frames.values()
        sliders = (_slider(name, self.values[name], i) for name, i in self.start.items())
        return (
            '<div class="phase2-explore" role="group" aria-label="A figure and its sliders" '
            f'data-frames="{" ".join(frame.uri for frame in frames)}" '
            f'data-alts="{escape(dumps([frame.alt for frame in frames], ensure_ascii=False))}" '
            f'oninput="{escape(_ON_INPUT)}">\n'
            f"{self.frames[tuple(self.start.values())]._repr_html_()}\n{''.join(sliders)}</div>"
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        static = {"text/plain": repr(self), "text/html": self._repr_html_()}
        return self.live()._repr_mimebundle_() | static

    def live(self) -> Any:
        """The same figure as a widget, redrawn by the kernel at every move.

        Raises:
            ImportError: if ipywidgets is missing.
        """
        widgets = _require("ipywidgets")
        picture = widgets.HTML(self.frames[tuple(self.start.values())]._repr_html_())
        sliders = [
            widgets.SelectionSlider(
                options=[(_label(value), i) for i, value in enumerate(self.values[name])],
                value=i,
                description=_title(name),
                layout={"width": "100%", "max_width": "640px"},
            )
            for name, i in self.start.items()
        ]

        def redraw(_):
            try:
                picture.value = self._picture([s.value for s in sliders])._repr_html_()
            except Exception as error:  # a callback has no cell to report to
                picture.value = f"<pre>{escape(f'{type(error).__name__}: {error}')}</pre>"

        for slider in sliders:
            slider.observe(redraw, "value")
        return widgets.VBox([picture, *sliders])


def _check(alt: str, start: dict[str, Any], values: dict[str, list]) -> None:
    if not values:
        raise ValueError("explore needs at least one slider, as in gamma=[0.1, 0.2, 0.4]")
    for name, v in values.items():
        if not v:
            raise ValueError(f"{name} must be a list of values, got an empty one")
    count = math.prod(len(v) for v in values.values())
    if count > MAX_FRAMES:
        raise ValueError(f"{count} combinations of values, allowed are {MAX_FRAMES}: give fewer")
    for name, value in start.items():
        if value not in values.get(name, []):
            raise ValueError(f"start has {name} = {value!r}, which is not among the values")
    named = {field for _, field, _, _ in Formatter().parse(alt) if field is not None}
    if named != set(values):
        wanted = ", ".join(f"{{{name}}}" for name in values)
        raise ValueError(f"alt must name each slider and nothing else ({wanted}), got {alt!r}")


def _slider(name: str, values: list, position: int) -> str:
    labels = [_label(value) for value in values]
    return (
        '<label style="display: flex; align-items: center; gap: 0.75em; max-width: 640px">'
        f'<span style="min-width: 5em">{escape(_title(name))}</span>'
        f'<input type="range" min="0" max="{len(labels) - 1}" value="{position}" '
        f'aria-label="{escape(_title(name))}" aria-valuetext="{escape(labels[position])}" '
        f'data-labels="{escape(dumps(labels, ensure_ascii=False))}" '
        'autocomplete="off" style="flex: 1; min-width: 0">'
        f'<span aria-hidden="true" style="min-width: 4em">{escape(labels[position])}</span>'
        "</label>\n"
    )


def _title(name: str) -> str:
    return name.replace("_", " ")


def _label(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _png(figure: Any) -> bytes:
    """The figure as a PNG of few colors, without the metadata that would change from run to run."""
    image, true, few = _require("PIL.Image"), io.BytesIO(), io.BytesIO()
    figure.savefig(true, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    _require("matplotlib.pyplot").close(figure)  # or the notebook shows it a second time
    colors = image.open(true).convert("RGB")
    # Maximum coverage keeps rare colors, such as a color bar's, which the default would merge.
    colors = colors.quantize(PALETTE, image.Quantize.MAXCOVERAGE, dither=image.Dither.NONE)
    colors.save(few, format="png", optimize=True)
    return few.getvalue()


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        message = f"phase2.display needs {package}, which comes with: pip install 'phase2[book]'"
        raise ImportError(message) from error
