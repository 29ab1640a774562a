"""The built book in a browser whose network ends at this machine.

Needs Chromium and a built book (`make book`). Where either is missing the tests are skipped, except
under CI, where that is a failure.
"""

import functools
import http.server
import threading
from pathlib import Path

import pytest
from conftest import missing

BOOK = Path(__file__).parents[2] / "_build" / "html"
PAGES = sorted(
    str(page.relative_to(BOOK))
    for folder in ("book", "notebooks")
    for page in (BOOK / folder).glob("*.html")
)
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def site():
    """The book's address on the loopback interface."""
    if not PAGES:
        missing("no book in _build/html: make book")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=BOOK)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def load(site, browser):
    """Open a page, once; with it comes the list of everything that went wrong on it since."""
    context = browser.new_context(viewport=DESKTOP)
    opened = {}

    def open_page(name: str):
        if name not in opened:
            page, wrong = context.new_page(), []

            def only_here(route):
                if route.request.url.startswith((site, "data:")):
                    route.continue_()
                else:
                    wrong.append(f"external request: {route.request.url}")
                    route.abort()

            page.route("**/*", only_here)
            page.on("pageerror", lambda error: wrong.append(f"page error: {error}"))
            page.on("requestfailed", lambda r: wrong.append(f"failed request: {r.url[:200]}"))
            page.on(
                "response",
                lambda r: r.status >= 400 and wrong.append(f"status {r.status}: {r.url[:200]}"),
            )
            page.on(
                "console",
                lambda m: m.type in ("error", "warning") and wrong.append(f"console: {m.text}"),
            )
            page.goto(site + name, wait_until="load")
            page.evaluate("window.MathJax ? MathJax.startup.promise : null")
            opened[name] = page, wrong
        opened[name][0].bring_to_front()  # pages in the background are throttled
        return opened[name]

    yield open_page
    context.close()


def test_the_book_is_whole():
    """Every page of the table of contents was built, and so is tested below."""
    yaml = pytest.importorskip("yaml")
    if not PAGES:
        missing("no book in _build/html: make book")
    toc = yaml.safe_load((BOOK.parents[1] / "_toc.yml").read_text())
    chapters = [c["file"] for part in toc["parts"] for c in part["chapters"]]
    assert {f"{name}.html" for name in [toc["root"], *chapters]} == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched_and_nothing_fails(load, name):
    page, wrong = load(name)
    page.wait_for_load_state("networkidle")
    assert wrong == []


# Displayed equations that are wider than their column.
WIDE = """() => [...document.querySelectorAll('.bd-article div.math')]
    .filter(e => { const box = e.querySelector('mjx-container');
        return [...box.children].some(
            child => child.getBoundingClientRect().width > box.clientWidth + 2); })
    .map(e => e.id || e.textContent)"""


@pytest.mark.parametrize("name", PAGES)
def test_math_is_typeset(load, name):
    page, _ = load(name)
    for formula in page.locator(".bd-article .math").all():
        assert formula.locator("mjx-container").count(), formula.text_content()
    assert page.locator(".bd-article mjx-merror, .bd-article [data-mjx-error]").count() == 0
    assert page.evaluate(WIDE) == []
    prose = page.evaluate(
        """() => {
            const copy = document.querySelector('.bd-article').cloneNode(true);
            copy.querySelectorAll('pre, code, mjx-container, script').forEach(e => e.remove());
            return copy.textContent;
        }"""
    )
    for raw in ("$$", r"\(", r"\[", r"\begin{"):
        assert raw not in prose, f"raw {raw} on the page: …{prose[prose.index(raw) :][:80]}…"


@pytest.mark.parametrize("name", PAGES)
def test_pictures_have_alternative_texts(load, name):
    page, _ = load(name)
    for alt in page.eval_on_selector_all("img", "all => all.map(i => i.alt.trim())"):
        assert alt, f"a picture without alternative text on {name}"
        assert not alt.endswith((".png", ".svg", ".jpg")), f"a file name is no text: {alt}"


# What a slider shows: the picture, the picture's text, and the value it says it has.
SHOWN = """slider => {
    const picture = slider.closest('.phase2-explore').querySelector('img');
    return [picture.src, picture.alt, slider.ariaValueText];
}"""


@pytest.mark.parametrize("name", PAGES)
def test_sliders_change_their_picture(load, name):
    page, wrong = load(name)
    before = len(wrong)
    for slider in page.locator(".phase2-explore").get_by_role("slider").all():
        assert slider.get_attribute("aria-label")

        slider.press("Home")  # the keyboard: every value is another picture
        seen = [slider.evaluate(SHOWN)]
        for _ in range(int(slider.get_attribute("max"))):
            page.keyboard.press("ArrowRight")
            seen.append(slider.evaluate(SHOWN))
        for shown in zip(*seen, strict=True):
            assert len(set(shown)) == len(seen), "two values show the same"

        shape = slider.bounding_box()  # the mouse: the ends are where the keys found them
        for x, expected in ((2, seen[0]), (shape["width"] - 2, seen[-1])):
            slider.click(position={"x": x, "y": shape["height"] / 2})
            assert slider.evaluate(SHOWN) == expected
    assert wrong[before:] == []


@pytest.mark.parametrize("name", [page for page in PAGES if page.startswith("notebooks/0")])
def test_chapters_have_something_to_explore(load, name):
    page, _ = load(name)
    assert page.locator(".phase2-explore").count() >= 1


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_does_not_scroll_sideways(load, name):
    page, _ = load(name)
    page.set_viewport_size(PHONE)
    try:
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], f"{name} is {wide} px wide on a {PHONE['width']} px phone"
        assert page.evaluate(WIDE) == []
    finally:
        page.set_viewport_size(DESKTOP)


def test_dark_pages_keep_pictures_light(site, browser):
    """The figures' colors need their white card when the reader's system is dark."""
    context = browser.new_context(viewport=DESKTOP, color_scheme="dark")
    page = context.new_page()
    name = next((n for n in PAGES if 'class="phase2-picture"' in (BOOK / n).read_text()), None)
    if name is None:
        missing("no page with a picture in the book")
    page.goto(site + name)
    ground = "e => getComputedStyle(e).backgroundColor"
    assert page.eval_on_selector(".phase2-picture", ground) == "rgb(255, 255, 255)"
    red = page.eval_on_selector("body", ground).removeprefix("rgb(").split(",")[0]
    assert int(red) < 64
    context.close()
