"""A page is a flat list of blocks. It is rendered as markdown and as one self-contained HTML file.

Blocks are plain tuples:
("heading", text), ("subheading", text), ("paragraph", text), ("warning", text), ("list", items)
("details", summary, text): folded until a reader opens it
("figure", file name, caption): figures are {file name: PNG bytes, or (PNG bytes, hotspots)}. A hotspot
    (x, y, text) has the text for a point; x, y: fractions of the picture from its top left.
("table", header, rows, kind): kind is "numbers", "text" or "samples". A row of a single cell is a
    subheading. A cell may end in a ratio such as " ×0.53".
("runs", header, rows, filters): a table that sorts by any column and has a menu for each column named in
    `filters`. A cell is text, a number, None (no value), or (text, the number that it sorts by).
"""

import base64
import html
import math
import re
from pathlib import Path

RATIO = re.compile(r" ×\d[\d.]*$")
NO_RATIO = " " * len(" ×0.705")


def align_ratios(rows: list[list[str]]) -> list[list[str]]:
    """In columns with ratios, leave room behind each number without one: the numbers line up."""
    columns = {i for row in rows for i, cell in enumerate(row) if RATIO.search(cell)}
    aligned = []
    for row in rows:
        lacks_ratio = [i in columns and not RATIO.search(cell) for i, cell in enumerate(row)]
        aligned.append([cell + NO_RATIO if lacks else cell for cell, lacks in zip(row, lacks_ratio)])
    return aligned


def encode(document: str) -> bytes:
    return document.encode("utf-8", "replace")  # a sample may hold half a character


# ---- text that is shown unchanged --------------------------------------------------------------------------

CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]")  # a terminal acts on them
LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# marks that start a heading, a list, a rule or a block of code; **bold** is none
BLOCK_MARK = re.compile(r"^(\d*)(?=[#+=~.)-]|\*(?!\*[^\s*])|_[\s_])")


def visible(words: str) -> str:
    """The text with one kind of line break, and a visible mark instead of each control character."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", LINE_BREAK.sub("\n", words))


def markdown_text(words: str, has_emphasis: bool = True, begins_line: bool = False) -> str:
    """Text that markdown shows unchanged: it starts no link, picture, code, tag or cell of a table.

    has_emphasis: **bold** and _such_ keep their meaning: names with escaped underscores are hard to read.
    begins_line: the text is the first on its line, so a mark such as # would make it a heading.
    """
    marks = r"([\\`\[\]|])" if has_emphasis else r"([\\`\[\]|*_])"
    words = re.sub(marks, r"\\\1", visible(words))
    words = words.replace("://", "\\://").replace("www.", "www\\.")  # some readers make links of addresses
    if begins_line:
        words = BLOCK_MARK.sub(r"\1\\", words.lstrip())
    return html.escape(words, quote=False).replace("\n", "<br>")


# ---- markdown ----------------------------------------------------------------------------------------------


def to_markdown(blocks: list[tuple]) -> str:
    parts = []
    for block in blocks:
        match block:
            case ("heading", title):
                parts.append(f"## {markdown_text(title)}")
            case ("subheading", title):
                parts.append(f"### {markdown_text(title)}")
            case ("paragraph", words):
                parts.append(markdown_text(words, begins_line=True))
            case ("warning", words):
                parts.append(f"> **Warning:** {markdown_text(words)}")
            case ("list", items):
                parts.append("\n".join(f"- {markdown_text(item, begins_line=True)}" for item in items))
            case ("table", header, rows, kind):
                parts.append(markdown_table(header, rows, kind))
            case ("runs", header, rows, _):
                texts = [list(map(cell_text, row)) for row in rows]
                parts.append(markdown_table(header, texts, "numbers"))
            case ("figure", file, caption):
                parts.append(
                    f"![{markdown_text(caption)}]({file})\n\n{markdown_text(caption, begins_line=True)}"
                )
            case ("details", summary, words):
                parts.append(
                    f"<details><summary>{html_text(' '.join(summary.split()))}</summary>\n\n"
                    f"<pre>{escaped(words)}</pre>\n</details>"
                )
    return "\n\n".join(parts) + "\n"


def markdown_table(header: list[str], rows: list[list[str]], kind: str) -> str:
    """Columns padded to one width, so that it reads as a table in a terminal too."""
    lines = []
    for row in (header, *rows):
        cells = [markdown_text(cell, has_emphasis=kind != "samples") for cell in row]
        if len(cells) == 1:
            cells = [f"**{cells[0]}**"] + [""] * (len(header) - 1)
        lines.append(cells)
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    if kind != "numbers":
        widths = [min(width, 40) for width in widths]  # one long sample must not pad every row to its length
    right_aligned = [i > 0 and kind == "numbers" for i in range(len(header))]
    padded = []
    for cells in lines:
        columns = zip(cells, widths, right_aligned)
        padded.append([cell.rjust(width) if right else cell.ljust(width) for cell, width, right in columns])
    rule = [("-:" if right else "-").rjust(width, "-") for width, right in zip(widths, right_aligned)]
    padded.insert(1, rule)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in padded)


# ---- HTML --------------------------------------------------------------------------------------------------


def html_text(words: str) -> str:
    """Text that HTML shows unchanged, except that **bold** becomes bold."""
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escaped(words))


def escaped(words: str) -> str:
    """Text for an element or an attribute, without any markup."""
    return html.escape(visible(words))


def to_html(blocks: list[tuple], figures: dict) -> str:
    parts = []
    for block in blocks:
        match block:
            case ("heading", title):
                parts.append(f"<h2>{html_text(title)}</h2>")
            case ("subheading", title):
                parts.append(f"<h3>{html_text(title)}</h3>")
            case ("paragraph", words):
                parts.append(f"<p>{html_text(words)}</p>")
            case ("warning", words):
                parts.append(f'<p class="warning"><b>Warning:</b> {html_text(words)}</p>')
            case ("list", items):
                parts.append("<ul>" + "".join(f"<li>{html_text(item)}</li>" for item in items) + "</ul>")
            case ("table", header, rows, kind):
                parts.append(html_table(header, rows, kind))
            case ("runs", header, rows, filters):
                parts.append(html_runs(header, rows, filters))
            case ("figure", file, caption):
                parts.append(html_figure(figures[file], caption))
            case ("details", summary, words):
                parts.append(
                    f"<details><summary>{html_text(summary)}</summary><pre>{escaped(words)}</pre></details>"
                )
    return "\n".join(parts)


def html_table(header: list[str], rows: list[list[str]], kind: str) -> str:
    body = []
    for row in rows:
        first, *rest = row
        if rest:
            cells = "".join(f"<td>{html_cell(cell)}</td>" for cell in rest)
            body.append(f'<tr><th scope="row">{html_text(first)}</th>{cells}</tr>')
        else:
            heading = f'<th colspan="{len(header)}" scope="rowgroup">{html_text(first)}</th>'
            body.append(f'<tr class="section">{heading}</tr>')
    head = "".join(f'<th scope="col">{html_text(cell)}</th>' for cell in header)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>'
        + "\n".join(body)
        + "</tbody></table></div>"
    )


def html_cell(cell: str) -> str:
    """A number and its ratio; the ratio, or the room left for one, has a box of fixed width."""
    number = RATIO.sub("", cell).removesuffix(NO_RATIO)
    if number == cell:
        return escaped(cell)
    return f'{escaped(number)}<span class="ratio">{cell[len(number) :].strip()}</span>'


# ---- figures that name their points, tables that sort ------------------------------------------------------


def html_figure(figure, caption: str) -> str:
    png, hotspots = figure if isinstance(figure, tuple) else (figure, ())
    width = int.from_bytes(png[16:20], "big")
    height = int.from_bytes(png[20:24], "big")
    src = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    # one scale for all figures, so that their text has one size on the page
    picture = f'<img width="{width * 2 // 3}" src="{src}" alt="{escaped(caption)}">'
    if not hotspots:
        return f"<figure>{picture}<figcaption>{html_text(caption)}</figcaption></figure>"
    dots = "\n".join(
        f'<circle role="img" cx="{x * width:.1f}" cy="{y * height:.1f}" r="12">'
        f"<title>{escaped(text)}</title></circle>"
        for x, y, text in hotspots
    )
    hint = "Point at a mark, or tap it, to see what it is; with the keyboard: Tab, then the arrow keys."
    return (
        f'<figure><div class="picture">{picture}<svg viewBox="0 0 {width} {height}" role="group" '
        f'aria-label="Points of the figure">\n{dots}</svg></div>'
        f'<figcaption>{html_text(caption)} <span class="hint">{hint}</span></figcaption></figure>'
    )


def cell_text(cell) -> str:
    """A cell of a table of runs as text."""
    if isinstance(cell, tuple):
        return cell[0]
    if is_number(cell):
        return f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"
    return "–" if cell is None else str(cell)


def sort_value(cell) -> float | str | None:
    """The value by which a cell of a table of runs is sorted. None (no value, nan, inf) is last."""
    value = cell[1] if isinstance(cell, tuple) else cell
    if is_number(value):
        return value if math.isfinite(value) else None
    return None if value in (None, "") else str(value)


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def html_runs(header: list[str], rows: list[list], filters: list[str]) -> str:
    columns = list(zip(*rows)) or [()] * len(header)
    kinds = [' class="number"' if any(map(is_number, map(sort_value, column))) else "" for column in columns]
    head = "".join(f'<th scope="col"{kind}>{escaped(name)}</th>' for name, kind in zip(header, kinds))
    tags = ['th scope="row"'] + ["td"] * len(header)
    body = "\n".join("<tr>" + "".join(map(runs_cell, row, tags, kinds)) + "</tr>" for row in rows)
    menus = ""
    for name in filters:
        column = header.index(name)
        menus += menu(name, column, columns[column])
    return (
        '<div class="runs"><form hidden autocomplete="off">'
        f'<label>Search <input type="search"></label>{menus}'
        f"<span>Click a column's name to sort by it.</span></form>"
        f'<div class="wide" role="region" aria-label="Table of runs" tabindex="0">'
        f'<table><caption aria-live="polite">{len(rows)} rows</caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div></div>"
    )


def runs_cell(cell, tag: str, kind: str) -> str:
    value = sort_value(cell)
    data = ""
    if value is None:
        data = " data-missing"
    elif is_number(value):
        data = f' data-value="{value}"'
    return f"<{tag}{kind}{data}>{escaped(cell_text(cell))}</{tag[:2]}>"


def menu(name: str, column: int, cells: list) -> str:
    """A choice of the distinct texts of a column: numbers by value, then text, then cells without a value."""
    texts = dict.fromkeys(escaped(cell_text(cell)) for cell in sorted(cells, key=menu_order))
    options = "".join(f'<option value="{text}">{text}</option>' for text in texts)
    return (
        f"<label>{escaped(name)} "
        f'<select data-column="{column}"><option value="">all</option>{options}</select></label>'
    )


def menu_order(cell) -> tuple:
    value = sort_value(cell)
    if value is None:
        return (2, 0, "")
    return (0, value, "") if is_number(value) else (1, 0, value)


# ---- the whole page ----------------------------------------------------------------------------------------

CSS = Path(__file__).with_name("page.css").read_text("utf-8")
SCRIPT = Path(__file__).with_name("page.js").read_text("utf-8")


def to_page(title: str, blocks: list[tuple], figures: dict) -> str:
    """The whole page. Style, script and pictures are inside it: it loads no other file.

    It has a script only if it has a table of runs or hotspots.
    """
    body = to_html(blocks, figures)
    needs_script = '<div class="runs">' in body or '<div class="picture">' in body
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escaped(title)}</title><style>{CSS}</style></head>\n"
        f"<body><main><h1>{escaped(title)}</h1>\n{body}\n</main>"
        + (f"<script>{SCRIPT}</script>" if needs_script else "")
        + "</body></html>\n"
    )
