"""Figures and sliders: what a notebook stores, what a page shows, and what is refused."""

import base64
import html
import importlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from phase2 import display  # noqa: E402
from phase2.display import Picture, explore, show, use_style  # noqa: E402

URI = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context():
        use_style()
        yield
    left_open = plt.get_fignums()
    plt.close("all")
    assert left_open == []


def draw(gamma, omega=1):
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1], [gamma, omega])
    return fig


def parsed(explorable):
    """The attributes of the static page that its handler reads."""
    page = explorable._repr_html_()
    box = re.search(r'data-frames="(.*?)" data-alts="(.*?)"', page)
    labels = [json.loads(html.unescape(x)) for x in re.findall(r'data-labels="(.*?)"', page)]
    return box[1].split(" "), json.loads(html.unescape(box[2])), labels, page


def test_use_style_makes_readable_figures():
    fig, ax = plt.subplots()
    assert tuple(fig.get_size_inches()) == (6.4, 3.6)
    assert ax.xaxis.label.get_size() >= 10
    assert min(t.get_size() for t in ax.get_xticklabels()) >= 10
    assert "#F0E442" not in plt.rcParams["axes.prop_cycle"].by_key()["color"]
    plt.close(fig)


def test_picture_is_the_same_every_time():
    assert Picture(draw(1), "a line").uri == Picture(draw(1), "a line").uri
    assert Picture(draw(1), "a line").uri != Picture(draw(2), "a line").uri


def test_picture_is_small_and_keeps_its_colors():
    fig, ax = plt.subplots()
    for i in range(5):
        ax.plot([0, 1], [i, i], linewidth=6)
    picture = Picture(fig, "five lines")
    data = base64.b64decode(picture.uri.partition(",")[2])
    assert len(data) < 80_000
    pixels = importlib.import_module("PIL.Image").open(io.BytesIO(data)).convert("RGB")
    assert pixels.width > 900
    present = {color for _, color in pixels.getcolors(1000)}
    assert (255, 255, 255) in present
    for want in display.COLORS[:5]:
        rgb = tuple(int(want[i : i + 2], 16) for i in (1, 3, 5))
        assert min(sum(abs(a - b) for a, b in zip(rgb, p, strict=True)) for p in present) < 12


def test_a_color_bar_keeps_its_gradient():
    """Colors that are rare in the picture are not merged with their neighbors in the bar."""

    def heat_map():
        fig, ax = plt.subplots(figsize=(4.6, 3.6))
        values = [[math.sin(i * j + i + j) ** 3 / 3 for i in range(64)] for j in range(64)]
        fig.colorbar(ax.imshow(values, cmap="RdBu", vmin=-1, vmax=1))
        return fig

    true, fig = io.BytesIO(), heat_map()
    fig.savefig(true, format="png")
    plt.close(fig)
    kept = io.BytesIO(base64.b64decode(Picture(heat_map(), "waves").uri.partition(",")[2]))
    image = importlib.import_module("PIL.Image")
    pixels = [image.open(file).convert("RGB").tobytes() for file in (true, kept)]
    assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) <= 12  # of 255


def test_picture_carries_its_alternative_text():
    page = Picture(draw(1), 'energy "E" < 1')._repr_html_()
    assert 'alt="energy &quot;E&quot; &lt; 1"' in page
    assert 'width="200" height="100"' in page


@pytest.mark.parametrize("alt", ["", "  "])
def test_picture_needs_an_alternative_text(alt):
    fig = draw(1)
    with pytest.raises(ValueError, match="alt must say"):
        Picture(fig, alt)
    plt.close(fig)


def test_picture_needs_a_figure():
    with pytest.raises(TypeError, match="matplotlib Figure, got int"):
        Picture(3, "three")


def test_show_displays_the_picture(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    show(draw(1), alt="a line")
    assert [picture.alt for picture in shown] == ["a line"]


def test_explore_draws_every_combination_in_the_order_the_page_reads():
    calls = []

    def record(gamma, omega):
        calls.append((gamma, omega))
        return draw(gamma, omega)

    gammas, omegas = [0.1, 0.2, 0.4], [1, 2]
    frames, alts, labels, _ = parsed(
        explore(record, alt="{gamma}, {omega}", gamma=gammas, omega=omegas)
    )
    assert calls == [(g, o) for g in gammas for o in omegas]
    assert labels == [["0.1", "0.2", "0.4"], ["1", "2"]]
    assert len(set(frames)) == 6
    for i, g in enumerate(gammas):
        for j, o in enumerate(omegas):
            assert alts[i * 2 + j] == f"{g}, {o}"
            assert frames[i * 2 + j] == Picture(draw(g, o), "same").uri


def test_explore_starts_in_the_middle_or_where_told():
    values = {"gamma": [1, 2, 3, 4, 5], "omega": [1, 2]}
    page = explore(draw, alt="at {gamma} and {omega}", **values)._repr_html_()
    assert 'alt="at 3 and 2"' in page
    page = explore(draw, alt="at {gamma} and {omega}", start={"gamma": 5}, **values)._repr_html_()
    assert 'alt="at 5 and 2"' in page
    assert re.findall(r'max="(\d)" value="(\d)"', page) == [("4", "4"), ("1", "1")]


def test_explore_needs_nothing_but_the_page():
    frames, _, _, page = parsed(explore(draw, alt="{gamma}", gamma=[1, 2]))
    assert "<script" not in page and not re.search(r"\sid=", page)
    assert not re.search(r"https?:|//", URI.sub("", page))
    assert f'<img class="phase2-picture" src="{frames[1]}"' in page  # seen without JavaScript
    assert page.count("<label") == page.count('<input type="range"') == 1
    assert "\n\n" not in page  # a blank line would end the HTML in Markdown


def test_explore_is_stable_but_for_its_pixels():
    first, second = (explore(draw, alt="{gamma}", gamma=[1, 2]) for _ in range(2))
    assert repr(first) == repr(second) == "explore(gamma: 1 … 2; 2 pictures)"
    assert first._repr_html_() == second._repr_html_()


def test_explore_escapes_what_it_is_given():
    page = explore(lambda which: draw(1), alt='<{which}> "&"', which=["<b>", '"'])._repr_html_()
    assert "<b>" not in page and 'alt="&lt;&quot;&gt; &quot;&amp;&quot;"' in page


@pytest.mark.parametrize(
    "value, label", [(0.1 + 0.2, "0.3"), (1e-5, "1e-05"), (3, "3"), ("x", "x")]
)
def test_values_are_labelled_as_a_reader_writes_them(value, label):
    assert display._label(value) == label


def test_tensors_are_labelled_as_numbers():
    torch = pytest.importorskip("torch")
    assert [display._label(x) for x in torch.tensor([0.25, 2.0])] == ["0.25", "2"]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"alt": "nothing"}, ValueError, "at least one slider"),
        ({"alt": "{gamma}", "gamma": []}, ValueError, "gamma must be a list of values"),
        ({"alt": "{gamma}", "gamma": range(65)}, ValueError, "65 combinations.*allowed are 64"),
        ({"alt": "a line", "gamma": [1]}, ValueError, r"alt must name each slider.*\{gamma\}"),
        ({"alt": "{gamma} {beta}", "gamma": [1]}, ValueError, "alt must name each slider"),
        ({"alt": "{gamma}", "gamma": [1], "start": {"gamma": 2}}, ValueError, "gamma = 2, which"),
        ({"alt": "{gamma}", "gamma": [1], "start": {"beta": 2}}, ValueError, "beta = 2, which"),
    ],
)
def test_explore_refuses_before_drawing(arguments, error, message):
    def never(**_):
        raise AssertionError("drawn")

    with pytest.raises(error, match=message):
        explore(never, **arguments)


def test_explore_refuses_a_draw_without_figure():
    with pytest.raises(TypeError, match="matplotlib Figure, got NoneType"):
        explore(lambda gamma: None, alt="{gamma}", gamma=[1])


def test_explore_refuses_a_heavy_page(monkeypatch):
    monkeypatch.setattr(display, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="2 pictures take .* MB, allowed are"):
        explore(draw, alt="{gamma}", gamma=[1, 2])


def test_a_kernel_gets_the_page_and_the_live_widget():
    pytest.importorskip("ipywidgets")
    explorable = explore(draw, alt="{gamma}", gamma=[1, 2])
    bundle = explorable._repr_mimebundle_()
    assert bundle["text/plain"] == repr(explorable)
    assert bundle["text/html"] == explorable._repr_html_()
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_the_live_widget_draws_again():
    pytest.importorskip("ipywidgets")
    scale = 1

    def scaled(gamma, omega):
        return draw(scale * gamma, omega)

    explorable = explore(scaled, alt="{gamma}, {omega}", gamma=[1, 2], omega=[3, 4])
    picture, gamma, omega = explorable.live().children
    assert picture.value == explorable.frames[1, 1]._repr_html_()
    scale = 7  # as when the reader changes a cell above
    gamma.value, omega.value = 0, 0
    assert URI.search(picture.value)[0] == Picture(draw(7, 3), "same").uri
    assert 'alt="1, 3"' in picture.value


def test_the_live_widget_shows_an_error_in_place():
    pytest.importorskip("ipywidgets")
    broken = False

    def sometimes(gamma):
        if broken:
            raise ValueError("gamma <too> small")
        return draw(gamma)

    picture, gamma = explore(sometimes, alt="{gamma}", gamma=[1, 2]).live().children
    broken = True
    gamma.value = 0
    assert picture.value == "<pre>ValueError: gamma &lt;too&gt; small</pre>"


def test_the_core_imports_neither_matplotlib_nor_widgets():
    code = (
        "import sys, phase2.display; "
        "assert not {'matplotlib', 'ipywidgets', 'IPython', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    explorable = explore(draw, alt="{gamma}", gamma=[1])
    with pytest.raises(ImportError, match=r"needs ipywidgets.*phase2\[book\]"):
        explorable.live()


def test_the_committed_picture_is_one_a_notebook_drew():
    """The first page and the README show it; no picture there may be older than its notebook."""
    root = Path(__file__).parents[1]
    picture = base64.b64encode((root / "book/assets/picture.png").read_bytes()).decode()
    command = (
        "python -m phase2_book.picture notebooks/01_decay.ipynb picture book/assets/picture.png"
    )
    assert picture in (root / "notebooks/01_decay.ipynb").read_text(encoding="utf-8"), (
        f"out of date: {command}"
    )
