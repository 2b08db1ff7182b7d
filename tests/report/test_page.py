"""The page without a browser: tables of runs, figures with points, text. test_browser.py has the rest."""

import math
import random
import re
from html.parser import HTMLParser

import pytest

from nanochat.report.page import encode, to_markdown, to_page

HEADER = ["run", "rank", "perplexity", "time"]
ROWS = [
    ["a <b>&\"'", ("full", 0), 20.123456, ("2.00 min", 120.0)],
    ["b | </script>", 16, None, ("40.0 s", 40.0)],
    ["c", ("8", 8), math.nan, None],
]
PNG = bytes(16) + (300).to_bytes(4, "big") + (200).to_bytes(4, "big")
FIGURE = ("figure", "a.png", "A caption")


class Page(HTMLParser):
    """The tags in order as (name, attributes, the text directly behind)."""

    def __init__(self, words):
        super().__init__()
        self.tags = []
        self.feed(words)

    def handle_starttag(self, tag, attributes):
        self.tags.append([tag, dict(attributes), ""])

    def handle_data(self, data):
        if self.tags:
            self.tags[-1][2] += data

    def all(self, *names):
        return [(attributes, text.removesuffix("\n")) for tag, attributes, text in self.tags if tag in names]


def page(*blocks, figures=None):
    return to_page("A page", list(blocks), figures or {})


def test_a_table_of_runs_is_whole_without_a_script():
    cells = Page(page(("runs", HEADER, ROWS, []))).all("td", "th")
    assert [text for _, text in cells[:4]] == HEADER and all(a["scope"] == "col" for a, _ in cells[:4])
    texts = [text for _, text in cells[4:]]
    numbers = [a.get("data-value") for a, _ in cells[4:]]
    assert texts[:4] == ["a <b>&\"'", "full", "20.12", "2.00 min"]
    assert texts[4:8] == ["b | </script>", "16", "–", "40.0 s"]
    assert texts[8:] == ["c", "8", "nan", "–"]
    assert numbers == [None, "0", "20.123456", "120.0", None, "16", None, "40.0", None, "8", None, None]
    assert ["data-missing" in a for a, _ in cells[4:]] == [False] * 6 + [True] + [False] * 3 + [True, True]
    assert [a.get("class") for a, _ in cells[:4]] == [None, "number", "number", "number"]
    assert [a.get("scope") for a, _ in cells[4::4]] == ["row"] * 3


def test_what_sorts_is_the_exact_number_even_of_numpy():
    import numpy as np

    values = [0.1 + 0.2, 10**18 + 1, np.float64(1) / 3, 1e-300]
    cells = Page(page(("runs", ["a"], [[value] for value in values], []))).all("th")[1:]
    assert [float(a["data-value"]) for a, _ in cells] == [float(value) for value in values]


def test_filters_offer_each_text_once_numbers_by_value():
    rows = [["x", 16, "b"], ["y", 8, None], ["z", 128, "a"], ["w", 8, "b"], ["v", ("full", 0), '"</select>']]
    parsed = Page(page(("runs", ["run", "rank", "kind"], rows, ["rank", "kind"])))
    assert [(a["data-column"]) for a, _ in parsed.all("select")] == ["1", "2"]
    values = [a["value"] for a, _ in parsed.all("option")]
    assert values == ["", "full", "8", "16", "128"] + ["", '"</select>', "a", "b", "–"]
    assert "hidden" in parsed.all("form")[0][0]  # without a script there is nothing to filter with


def test_a_table_of_runs_in_markdown_is_an_ordinary_table():
    lines = to_markdown([("runs", HEADER, ROWS, ["rank"])]).splitlines()
    assert len(lines) == 5 and {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    assert lines[0].replace(" ", "") == "|run|rank|perplexity|time|"
    assert lines[1].endswith("--: |")
    assert "&lt;b&gt;" in lines[2] and lines[2].endswith(" full |      20.12 | 2.00 min |")
    assert "b \\| &lt;/script&gt;" in lines[3]
    assert to_markdown([("runs", HEADER, [], [])]).count("\n") == 2


def test_points_of_a_figure_are_named_where_they_are():
    hot = [(0.5, 0.25, 'run <1>\nppl "20" </title><script>x</script>'), (1.0, 0.0, "b")]
    parsed = Page(page(FIGURE, figures={"a.png": (PNG, hot)}))
    [(img, _)] = parsed.all("img")
    assert img["width"] == "200" and img["alt"] == "A caption"
    assert parsed.all("svg")[0][0]["viewbox"] == "0 0 300 200"
    assert [(a["cx"], a["cy"]) for a, _ in parsed.all("circle")] == [("150.0", "50.0"), ("300.0", "0.0")]
    assert [text for _, text in parsed.all("title")[1:]] == [hot[0][2], "b"]
    assert len(parsed.all("script")) == 1


def test_figures_may_be_plain_or_have_points_and_markdown_knows_neither():
    for figure in (PNG, (PNG, [])):
        parsed = Page(page(FIGURE, figures={"a.png": figure}))
        assert not parsed.all("svg", "script") and parsed.all("img")
    assert to_markdown([FIGURE]) == "![A caption](a.png)\n\nA caption\n"


def test_a_page_fetches_nothing_and_has_a_script_only_where_it_needs_one():
    for words, scripts in (
        (page(("paragraph", "x")), 0),
        (page(("runs", HEADER, ROWS, ["run"])), 1),
        (page(FIGURE, figures={"a.png": (PNG, [(0, 0, "x")])}), 1),
    ):
        document = encode(words).decode()
        parsed = Page(document)
        assert len(parsed.all("style")) == 1 and len(parsed.all("script")) == scripts
        assert not re.search("https?:|url\\(|@import|fetch\\(|XMLHttpRequest|import\\(", document)


def test_nothing_that_a_run_may_be_called_leaves_its_place():
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"' &amp; \u202e \ud83d"
    words = page(
        ("runs", [evil], [[evil], [(evil, 1.0)]], [evil]),
        FIGURE,
        figures={"a.png": (PNG, [(0.1, 0.1, evil)])},
    )
    parsed = Page(encode(words).decode())
    assert len(parsed.all("script")) == len(parsed.all("img")) == 1
    assert "alert" not in parsed.all("script")[0][1]
    assert [text for _, text in parsed.all("th")] == [evil.replace("\ud83d", "?")] * 3


HOSTILE = [
    "[x](javascript:alert(1))",
    "![x](http://x/y.png)",
    "[a]: javascript:x",
    "<javascript:alert(1)>",
    "<img src=x>",
    "`",
    "```",
    "|",
    "\\",
    "\\|",
    "\n",
    "\r",
    "\u2028",
    "\x1b[31m",
    "\x85",
    "\0",
    "# ",
    "- ",
    "1. ",
    "---",
    "~~~",
    "    ",
    "http://evil.com",
    "www.evil.com",
    "&#91;",
    "</pre>",
    "</details>",
    "a",
    "_",
    "*",
]


@pytest.mark.parametrize("seed", range(10))
def test_nothing_in_a_text_acts_as_markdown_or_moves_to_another_line(seed):
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices(HOSTILE, k=rng.randint(1, 6))) + "a"

    kind = rng.choice(["numbers", "text", "samples"])
    blocks = [
        ("heading", text()),
        ("paragraph", text()),
        ("warning", text()),
        ("list", [text(), text()]),
        ("table", [text(), text()], [[text(), text()], [text()]], kind),
        ("runs", [text(), text()], [[text(), text()]], []),
        ("details", text(), "rows"),
        ("figure", "a.png", "A caption"),
    ]
    lines = to_markdown(blocks).splitlines()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "".join(lines).replace("\t", ""))
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4 + 3 and {len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows} == {3}
    for line in lines:
        if not line.startswith(("![A caption]", "<details>")):
            words = re.sub(r"\\.", "", line.replace("<br>", ""))  # without what is escaped
            assert not re.search(r"[`\[\]]|://|www\.", words)
            assert "<" not in words or words in ("<pre>rows</pre>", "</details>")
    assert [line[0] for line in lines if line and line[0] in "#>-|"] == list("#>--") + ["|"] * 7
    assert len([line for line in lines if line]) == 17  # each block has its lines, and there is no other


def test_a_page_shows_control_characters_and_obeys_none():
    text = "a\x1b[31m\x9b\r\n\0b"
    words = page(
        ("heading", text),
        ("table", [text], [[text]], "text"),
        ("runs", [text], [[text]], [text]),
        ("details", text, text),
        FIGURE,
        figures={"a.png": (PNG, [(0, 0, text)])},
    )
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", words)
    assert words.count("a\ufffd[31m\ufffd\n\ufffdb") >= 10
