"""The page in a headless Chromium, opened from its file: python -m pytest tests -m browser"""

import io
import random

import pytest
from browser import Browser, find_chromium

from nanochat.report.page import encode, to_page

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium; on Debian: apt-get install chromium"),
]

EVIL = (
    "</script><script>document.title='evil'</script>"
    "<img src=http://127.0.0.1:9/x onerror=\"document.title='evil'\">"
)
HEADER = ["run", "depth", "attn rank", "perplexity", "training time", "note"]
FILTERS = ["depth", "attn rank"]


def runs_block():
    """24 runs: depth × rank × seed; one diverged, one without a time, one with a hostile name."""
    rng = random.Random(0)
    rows = []
    for depth in (4, 8, 12):
        for rank in (0, 16, 64, 128):
            for seed in (1, 2):
                seconds = depth * (20 + rank / 8) + rng.random()
                rows.append(
                    [
                        f"d{depth} r{rank} seed {seed}",
                        depth,
                        ("full", 0) if rank == 0 else rank,
                        30 - depth / 2 + 40 / (rank or 200) + rng.random(),
                        (f"{seconds / 60:.2f} min", seconds),
                        "baseline" if rank == 0 else "",
                    ]
                )
    rows[3][3] = float("nan")
    rows[5][4] = None
    rows[7][0] = EVIL
    return ("runs", HEADER, rows, FILTERS)


def figure():
    """A picture with three points: near the left top, the middle, the right bottom corner."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 5), layout="constrained")
    panel = fig.subplots()
    panel.plot([1, 2, 3], [3, 2, 1], "o")
    out = io.BytesIO()
    fig.savefig(out, dpi=150)
    fig.canvas.draw()
    width, height = fig.canvas.get_width_height()
    spots = [panel.transData.transform((x, 4 - x)) for x in (1, 2, 3)]
    texts = [
        "d4 full\nperplexity 28.31\nparameters 5.24 M",
        EVIL + "\nperplexity 20",
        "d12 r128 with a long name " + "and_more_" * 60,
    ]
    return out.getvalue(), [(x / width, 1 - y / height, text) for (x, y), text in zip(spots, texts)]


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """The browser with a page of a table and two pictures. Afterwards: no error, no other request."""
    blocks = [
        ("heading", "Runs"),
        runs_block(),
        ("heading", "Figures"),
        ("figure", "a.png", "Perplexity against parameters."),
        ("figure", "b.png", "The same without points."),
    ]
    picture, hotspots = figure()
    path = tmp_path / "report.html"
    path.write_bytes(encode(to_page("A study", blocks, {"a.png": (picture, hotspots), "b.png": picture})))
    browser.resize(1200, 900)
    browser.mouse(0, 0)
    browser.open(path.as_uri())
    yield browser
    complaints = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event["params"] for event in browser.events if event["method"] in complaints] == []
    requests = [event for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    urls = [event["params"]["request"]["url"] for event in requests]
    assert [url for url in urls if not url.startswith("data:")] == [path.as_uri()]
    assert browser.run("document.title") == "A study"


def column(browser, name: str) -> list[str]:
    """The texts of a column, of the rows that are shown, from top to bottom."""
    return browser.run(
        f"[...document.querySelectorAll('.runs tbody tr')].filter(row => row.offsetHeight)"
        f".map(row => row.cells[{HEADER.index(name)}].textContent)"
    )


def middle(browser, selector: str) -> tuple[float, float]:
    """Where to point at an element, after it was scrolled to."""
    box = browser.run(
        f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
        "const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; })()"
    )
    return tuple(box)


def header(name: str) -> str:
    return f".runs thead th:nth-child({HEADER.index(name) + 1}) button"


def sorted_by(browser) -> list:
    return browser.run(
        "[...document.querySelectorAll('.runs thead th')].map(h => h.getAttribute('aria-sort'))"
    )


def caption(browser) -> str:
    return browser.run("document.querySelector('.runs caption').textContent")


def test_a_click_sorts_numbers_by_value_and_missing_ones_last(opened):
    before = column(opened, "run")
    opened.click(*middle(opened, header("perplexity")))
    up = column(opened, "perplexity")
    assert up[:-1] == sorted(up[:-1], key=float) and up[-1] == "nan" and len(up) == 24
    assert sorted_by(opened) == [None, None, None, "ascending", None, None]
    opened.click(*middle(opened, header("perplexity")))
    down = column(opened, "perplexity")
    assert down == up[-2::-1] + ["nan"] and sorted_by(opened)[3] == "descending"
    opened.click(*middle(opened, header("training time")))  # shown in minutes, sorted by seconds
    times = column(opened, "training time")
    minutes = [float(text.split()[0]) for text in times[:-1]]
    assert minutes == sorted(minutes) and times[-1] == "–"
    assert sorted_by(opened) == [None, None, None, None, "ascending", None]
    assert sorted(column(opened, "run")) == sorted(before)


def test_a_second_column_sorts_within_the_first_and_text_in_natural_order(opened):
    opened.click(*middle(opened, header("run")))
    names = column(opened, "run")
    in_order = ["d4 r64 seed 1", "d8 r16 seed 1", "d8 r128 seed 1", "d12 r0 seed 1"]
    assert [name for name in names if name in in_order] == in_order
    opened.click(*middle(opened, header("attn rank")))
    assert column(opened, "attn rank") == [text for text in ("full", "16", "64", "128") for _ in range(6)]
    of_rank_16 = [name for name in column(opened, "run") if "r16 " in name]
    assert of_rank_16 == [name for name in names if "r16 " in name]


def test_the_keyboard_sorts(opened):
    opened.run("document.querySelector('.runs input').focus()")
    for _ in range(7):  # two menus, the table, which may scroll, and four headers
        opened.key("Tab")
        if opened.run("document.activeElement.textContent") == "perplexity":
            break
    opened.key("Enter")
    assert sorted_by(opened)[3] == "ascending"
    opened.key("Enter")
    assert sorted_by(opened)[3] == "descending"


def choose(browser, name: str, text: str):
    at = HEADER.index(name)
    browser.run(
        f"(() => {{ const s = document.querySelector('select[data-column=\"{at}\"]'); s.value = {text!r};"
        "s.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def test_menus_and_free_text_filter_together(opened):
    assert caption(opened).startswith("24 of 24 rows")
    choose(opened, "depth", "8")
    assert set(column(opened, "depth")) == {"8"} and caption(opened).startswith("8 of 24 rows")
    choose(opened, "attn rank", "full")
    assert column(opened, "run") == ["d8 r0 seed 1", "d8 r0 seed 2"]
    opened.click(*middle(opened, ".runs input"))
    for letter in "SEED 2":
        opened.key(letter)
    assert column(opened, "run") == ["d8 r0 seed 2"] and caption(opened).startswith("1 of 24 rows")
    opened.key("Enter")  # sends no form
    opened.run("document.querySelector('.runs form').reset()")
    choose(opened, "depth", "")
    assert len(column(opened, "run")) == 24


def tip(browser):
    """(text, whether it lies inside the window), or None where no text is shown."""
    return browser.run(
        """(() => {
            const tip = document.querySelector('.tip'), box = tip.getBoundingClientRect();
            if (tip.hidden || !box.height) return null;
            const across = box.left >= 0 && box.right <= innerWidth;
            return [tip.textContent, across && box.top >= 0 && box.bottom <= innerHeight];
        })()"""
    )


def test_pointing_at_a_mark_names_it_and_pointing_away_does_not(opened):
    for i in (1, 2, 3):
        x, y = middle(opened, f"circle:nth-child({i})")
        for dx, dy in ((0, 0), (12, -9)):  # near is enough
            opened.mouse(x + dx, y + dy)
            text, inside = tip(opened)
            assert text == figure()[1][i - 1][2] and inside
    assert opened.run("document.querySelectorAll('circle.on').length") == 1
    opened.mouse(x - 60, y - 60)
    assert tip(opened) is None
    # nothing that the browser would show beside it
    assert opened.run("document.querySelectorAll('.picture title').length") == 0


@pytest.mark.parametrize("width, height", [(320, 300), (700, 400), (1600, 1000)])
def test_the_text_stays_in_the_window(opened, width, height):
    opened.resize(width, height)
    for i in (1, 2, 3):
        opened.mouse(*middle(opened, f"circle:nth-child({i})"))
        assert tip(opened)[1]
        opened.run(f"document.querySelector('circle:nth-child({i})').focus(); scrollBy(0, 100)")
        assert tip(opened)[1]


def test_the_keyboard_goes_from_mark_to_mark(opened):
    opened.run("document.querySelector('circle').focus()")
    texts = []
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft"):
        opened.key(key)
        texts.append([text for *_, text in figure()[1]].index(tip(opened)[0]))
    assert texts == [1, 2, 0, 2]
    opened.key("Escape")
    assert tip(opened) is None
    assert opened.run("[...document.querySelectorAll('circle')].filter(c => c.tabIndex === 0).length") == 1


def test_a_tap_names_a_mark_until_the_next_one(opened):
    opened.resize(390, 800, mobile=True)
    opened.send("Emulation.setTouchEmulationEnabled", enabled=True)
    x, y = middle(opened, "circle:nth-child(2)")
    opened.tap(x, y)
    assert tip(opened) == [figure()[1][1][2], True]
    opened.tap(*middle(opened, "h1"))
    assert tip(opened) is None
    opened.send("Emulation.setTouchEmulationEnabled", enabled=False)


def test_without_javascript_it_is_a_plain_table_and_on_paper_too(opened):
    opened.send("Emulation.setEmulatedMedia", media="print")
    assert opened.run("getComputedStyle(document.querySelector('.runs form')).display") == "none"
    opened.send("Emulation.setEmulatedMedia", media="")
    assert opened.pdf().startswith(b"%PDF")
    opened.send("Emulation.setScriptExecutionDisabled", value=True)
    opened.open(opened.run("location.href"))
    opened.send("Emulation.setScriptExecutionDisabled", value=False)
    assert len(column(opened, "run")) == 24
    assert opened.run("document.querySelectorAll('.runs button').length") == 0
    assert opened.run("document.querySelector('.runs form').offsetHeight") == 0
    assert opened.run("document.querySelector('.runs caption').textContent") == "24 rows"
