"""A page written once as a flat list of blocks, rendered as markdown and as one self-contained HTML file.

Blocks are plain tuples: ("heading", text), ("subheading", text), ("paragraph", text), ("warning", text), ("list", items),
("table", header, rows, kind), ("runs", header, rows, filters), ("figure", file name, caption), ("details", summary, text).
In a table a row of a single cell is a subheading; kind is "numbers", "text" or "samples"; a cell may end in a ratio such as
" ×0.53". A table of runs sorts by any column and has a drop-down for each column named in `filters`; its cells are text,
numbers, None where there is no value, or (text, the number it sorts by). Figures are {file name: PNG bytes, or (PNG bytes,
hotspots)}: a hotspot (x, y, text) names what is drawn there, x and y as fractions of the picture from its top left.
"""

import base64
import hashlib
import html
import math
import re
from pathlib import Path

RATIO = re.compile(r" ×\d[\d.]*$")
NO_RATIO = " " * len(" ×0.705")


def align_ratios(rows: list[list[str]]) -> list[list[str]]:
    """Leave the room of a ratio after numbers without one, in columns that hold ratios, so that the numbers line up."""
    columns = {i for row in rows for i, cell in enumerate(row) if RATIO.search(cell)}
    return [
        [cell + NO_RATIO if i in columns and not RATIO.search(cell) else cell for i, cell in enumerate(row)]
        for row in rows
    ]


def encode(document: str) -> bytes:
    return document.encode("utf-8", "replace")  # a sample may hold half a character


# ---- any text, in a place where it is only text ------------------------------------------------------------

CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # a terminal may obey them
LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# what begins a heading, a list, a rule or a block of code; **bold** does not
BLOCK_MARK = re.compile(r"^(\d*)(?=[#+=~.)-]|\*(?!\*[^\s*])|_[\s_])")


def visible(words: str) -> str:
    """Text of one kind of line break, where control characters are seen and do nothing."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", LINE_BREAK.sub("\n", words))


def in_markdown(words: str, own: bool = True, begins_line: bool = False) -> str:
    """Text that markdown shows as it is: no link, picture, code, tag or cell of a table begins in it.

    own: **bold** and _such_ may act, since names with underscores would be hard to read. begins_line: nothing
    stands before it that says what the line is.
    """
    words = re.sub(r"([\\`\[\]|])" if own else r"([\\`\[\]|*_])", r"\\\1", visible(words))
    words = words.replace("://", "\\://").replace("www.", "www\\.")  # some readers make links of addresses
    if begins_line:
        words = BLOCK_MARK.sub(r"\1\\", words.lstrip())
    return html.escape(words, quote=False).replace("\n", "<br>")


def to_markdown(blocks: list[tuple]) -> str:
    parts = []
    for block in blocks:
        match block:
            case ("heading", title):
                parts.append(f"## {in_markdown(title)}")
            case ("subheading", title):
                parts.append(f"### {in_markdown(title)}")
            case ("paragraph", words):
                parts.append(in_markdown(words, begins_line=True))
            case ("warning", words):
                parts.append(f"> **Warning:** {in_markdown(words)}")
            case ("list", items):
                parts.append("\n".join(f"- {in_markdown(item, begins_line=True)}" for item in items))
            case ("table", header, rows, kind):
                parts.append(markdown_table(header, rows, kind))
            case ("runs", header, rows, _):
                parts.append(
                    markdown_table(header, [[shown(cell) for cell in row] for row in rows], "numbers")
                )
            case ("figure", file, caption):
                parts.append(f"![{in_markdown(caption)}]({file})\n\n{in_markdown(caption, begins_line=True)}")
            case ("details", summary, words):
                parts.append(
                    f"<details><summary>{in_html(' '.join(summary.split()))}</summary>\n\n"
                    f"<pre>{html.escape(visible(words))}</pre>\n</details>"
                )
    return "\n\n".join(parts) + "\n"


def markdown_table(header: list[str], rows: list[list[str]], kind: str) -> str:
    """Columns padded to one width, so that it reads as a table in a terminal too."""
    lines = [[in_markdown(cell, own=kind != "samples") for cell in row] for row in (header, *rows)]
    lines = [[f"**{row[0]}**"] + [""] * (len(header) - 1) if len(row) == 1 else row for row in lines]
    widths = [max(3, *(len(row[i]) for row in lines)) for i in range(len(header))]
    if kind != "numbers":
        widths = [min(width, 40) for width in widths]  # one long sample must not pad every row to its length
    right = [i > 0 and kind == "numbers" for i in range(len(header))]
    padded = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)] for row in lines]
    padded.insert(1, ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right)])
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


def in_html(words: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(visible(words)))


def to_html(blocks: list[tuple], figures: dict) -> str:
    parts = []
    for block in blocks:
        match block:
            case ("heading", title):
                parts.append(f"<h2>{in_html(title)}</h2>")
            case ("subheading", title):
                parts.append(f"<h3>{in_html(title)}</h3>")
            case ("paragraph", words):
                parts.append(f"<p>{in_html(words)}</p>")
            case ("warning", words):
                parts.append(f'<p class="warning"><b>Warning:</b> {in_html(words)}</p>')
            case ("list", items):
                parts.append("<ul>" + "".join(f"<li>{in_html(item)}</li>" for item in items) + "</ul>")
            case ("table", header, rows, kind):
                parts.append(html_table(header, rows, kind))
            case ("runs", header, rows, filters):
                parts.append(html_runs(header, rows, filters))
            case ("figure", file, caption):
                parts.append(html_figure(figures[file], caption))
            case ("details", summary, words):
                parts.append(
                    f"<details><summary>{in_html(summary)}</summary>"
                    f"<pre>{html.escape(visible(words))}</pre></details>"
                )
    return "\n".join(parts)


def html_table(header: list[str], rows: list[list[str]], kind: str) -> str:
    body = []
    for row in rows:
        if len(row) == 1:
            body.append(
                f'<tr class="section"><th colspan="{len(header)}" scope="rowgroup">{in_html(row[0])}</th></tr>'
            )
        else:
            body.append(
                f'<tr><th scope="row">{in_html(row[0])}</th>'
                + "".join(f"<td>{html_cell(c)}</td>" for c in row[1:])
                + "</tr>"
            )
    head = "".join(f'<th scope="col">{in_html(cell)}</th>' for cell in header)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(body)
        + "</tbody></table></div>"
    )


def html_cell(cell: str) -> str:
    """A ratio, or the room left for one, gets its own box of fixed width."""
    value = RATIO.sub("", cell).removesuffix(NO_RATIO)
    shown_ratio = f'<span class="ratio">{cell[len(value) :].strip()}</span>' if value != cell else ""
    return html.escape(visible(value)) + shown_ratio


# ---- pictures that name their points, tables that sort --------------------------------------------------------------


def html_figure(figure, caption: str) -> str:
    png, hotspots = figure if isinstance(figure, tuple) else (figure, ())
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    src = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    # all figures' text at one size on the page
    picture = f'<img width="{width * 2 // 3}" src="{src}" alt="{html.escape(visible(caption))}">'
    if not hotspots:
        return f"<figure>{picture}<figcaption>{in_html(caption)}</figcaption></figure>"
    dots = "\n".join(
        f'<circle role="img" cx="{x * width:.1f}" cy="{y * height:.1f}" r="12">'
        f"<title>{html.escape(visible(text))}</title></circle>"
        for x, y, text in hotspots
    )
    return (
        f'<figure><div class="picture">{picture}<svg viewBox="0 0 {width} {height}" role="group" '
        f'aria-label="Points of the figure">\n{dots}</svg></div><figcaption>{in_html(caption)} <span class="hint">'
        "Point at a mark, or tap it, to see what it is; with the keyboard: Tab, then the arrow keys.</span></figcaption></figure>"
    )


def shown(cell) -> str:
    """A cell of a table of runs as text."""
    if isinstance(cell, tuple):
        return cell[0]
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"
    return "–" if cell is None else str(cell)


def value(cell) -> float | str | None:
    """What a cell of a table of runs sorts by: a number, its text, or None (no value, nan, inf), which comes last."""
    cell = cell[1] if isinstance(cell, tuple) else cell
    if isinstance(cell, (int, float)) and not isinstance(cell, bool):
        return cell if math.isfinite(cell) else None
    return None if cell in (None, "") else str(cell)


def html_runs(header: list[str], rows: list[list], filters: list[str]) -> str:
    numeric = [any(isinstance(value(row[i]), (int, float)) for row in rows) for i in range(len(header))]
    kinds = [' class="number"' if is_numeric else "" for is_numeric in numeric]
    head = "".join(
        f'<th scope="col"{kind}>{html.escape(visible(name))}</th>' for name, kind in zip(header, kinds)
    )
    tags = ['th scope="row"'] + ["td"] * len(header)
    body = "\n".join("<tr>" + "".join(map(runs_cell, row, tags, kinds)) + "</tr>" for row in rows)
    menus = "".join(
        drop_down(name, header.index(name), [row[header.index(name)] for row in rows]) for name in filters
    )
    return (
        f'<div class="runs"><form hidden autocomplete="off"><label>Search <input type="search"></label>{menus}'
        f"<span>Click a column's name to sort by it.</span></form>"
        f'<div class="wide" role="region" aria-label="Table of runs" tabindex="0">'
        f'<table><caption aria-live="polite">{len(rows)} rows</caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div></div>"
    )


def runs_cell(cell, tag: str, kind: str) -> str:
    by = value(cell)
    by = " data-missing" if by is None else "" if isinstance(by, str) else f' data-value="{by}"'
    return f"<{tag}{kind}{by}>{html.escape(visible(shown(cell)))}</{tag[:2]}>"


def drop_down(name: str, column: int, cells: list) -> str:
    """The distinct texts of a column as a menu: numbers by value, then text, then what has no value."""

    def order(cell):
        by = value(cell)
        return (2, 0, "") if by is None else (1, 0, by) if isinstance(by, str) else (0, by, "")

    options = dict.fromkeys(html.escape(visible(shown(cell))) for cell in sorted(cells, key=order))
    return (
        f"<label>{html.escape(visible(name))} "
        f'<select data-column="{column}"><option value="">all</option>'
        + "".join(f'<option value="{text}">{text}</option>' for text in options)
        + "</select></label>"
    )


# ---- the whole page -------------------------------------------------------------------------------------------------

CSS = Path(__file__).with_name("page.css").read_text("utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text("utf-8")


def policy(script: str) -> str:
    """A Content-Security-Policy that lets the page run its own style and script and show its own pictures, and nothing else."""

    def only(source):
        return (
            f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
            if source
            else "'none'"
        )

    return f"default-src 'none'; img-src data:; style-src {only(CSS)}; script-src {only(script)}; base-uri 'none'; form-action 'none'"


def to_page(title: str, blocks: list[tuple], figures: dict) -> str:
    """The whole page: style, script and pictures inside, nothing fetched. A page with nothing to sort or to point at has no script."""
    body = to_html(blocks, figures)
    title = visible(title)
    script = SCRIPT if '<div class="runs">' in body or '<div class="picture">' in body else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(script)}">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head>\n"
        f"<body><main><h1>{html.escape(title)}</h1>\n{body}\n</main>"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )
