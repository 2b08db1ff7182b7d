"""A page written once as a flat list of blocks, rendered as markdown and as one self-contained HTML file.

Blocks are plain tuples: ("heading", text), ("subheading", text), ("paragraph", text), ("warning", text), ("list", items),
("table", header, rows, kind), ("figure", file name, caption), ("details", summary, text). In a table a row of a single cell
is a subheading; kind is "numbers", "text" or "samples"; a cell may end in a ratio such as " ×0.53".
"""
import base64
import html
import re

RATIO = re.compile(r" ×\d[\d.]*$")
NO_RATIO = " " * len(" ×0.705")


def align_ratios(rows: list[list[str]]) -> list[list[str]]:
    """Leave the room of a ratio after numbers without one, in columns that hold ratios, so that the numbers line up."""
    columns = {i for row in rows for i, cell in enumerate(row) if RATIO.search(cell)}
    return [[cell + NO_RATIO if i in columns and not RATIO.search(cell) else cell for i, cell in enumerate(row)] for row in rows]


def encode(document: str) -> bytes:
    return document.encode("utf-8", "replace")  # a sample may hold half a character


def in_markdown(cell: str) -> str:
    return html.escape(cell, quote=False).replace("|", "\\|").replace("\n", "<br>")


def to_markdown(blocks: list[tuple]) -> str:
    parts = []
    for block in blocks:
        match block:
            case ("heading", title):
                parts.append(f"## {in_markdown(title)}")
            case ("subheading", title):
                parts.append(f"### {in_markdown(title)}")
            case ("paragraph", words):
                parts.append(in_markdown(words))
            case ("warning", words):
                parts.append(f"> **Warning:** {in_markdown(words)}")
            case ("list", items):
                parts.append("\n".join(f"- {in_markdown(item)}" for item in items))
            case ("table", header, rows, kind):
                parts.append(markdown_table(header, rows, kind))
            case ("figure", file, caption):
                parts.append(f"![{in_markdown(caption)}]({file})\n\n{in_markdown(caption)}")
            case ("details", summary, words):
                parts.append(f"<details><summary>{in_markdown(summary)}</summary>\n\n<pre>{html.escape(words)}</pre>\n</details>")
    return "\n\n".join(parts) + "\n"


def markdown_table(header: list[str], rows: list[list[str]], kind: str) -> str:
    """Columns padded to one width, so that it reads as a table in a terminal too."""
    lines = [[in_markdown(cell) for cell in row] for row in (header, *rows)]
    if kind == "samples":  # free text: what happens to be markup must not act as it
        lines = [[re.sub(r"([\\`*_\[\]])", r"\\\1", cell) for cell in row] for row in lines]
    lines = [[f"**{row[0]}**"] + [""] * (len(header) - 1) if len(row) == 1 else row for row in lines]
    widths = [max(3, *(len(row[i]) for row in lines)) for i in range(len(header))]
    if kind != "numbers":
        widths = [min(width, 40) for width in widths]  # one long sample must not pad every row to its length
    right = [i > 0 and kind == "numbers" for i in range(len(header))]
    padded = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)] for row in lines]
    padded.insert(1, ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right)])
    return "\n".join("| " + " | ".join(row) + " |" for row in padded)


def in_html(words: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(words))


def to_html(blocks: list[tuple], figures: dict[str, bytes]) -> str:
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
            case ("figure", file, caption):
                data = base64.b64encode(figures[file]).decode()
                width = int.from_bytes(figures[file][16:20], "big") * 2 // 3  # all figures' text at one size on the page
                parts.append(f'<figure><img width="{width}" src="data:image/png;base64,{data}" alt="{html.escape(caption)}">'
                             f"<figcaption>{in_html(caption)}</figcaption></figure>")
            case ("details", summary, words):
                parts.append(f"<details><summary>{in_html(summary)}</summary><pre>{html.escape(words)}</pre></details>")
    return "\n".join(parts)


def html_table(header: list[str], rows: list[list[str]], kind: str) -> str:
    body = []
    for row in rows:
        if len(row) == 1:
            body.append(f'<tr class="section"><th colspan="{len(header)}">{in_html(row[0])}</th></tr>')
        else:
            body.append(f"<tr><th>{in_html(row[0])}</th>" + "".join(f"<td>{html_cell(c)}</td>" for c in row[1:]) + "</tr>")
    head = "".join(f"<th>{in_html(cell)}</th>" for cell in header)
    return (f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n<tbody>' + "\n".join(body)
            + "</tbody></table></div>")


def html_cell(cell: str) -> str:
    """A ratio, or the room left for one, gets its own box of fixed width."""
    value = RATIO.sub("", cell).removesuffix(NO_RATIO)
    return html.escape(value) + (f'<span class="ratio">{cell[len(value):].strip()}</span>' if value != cell else "")


CSS = """
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1a1a1a; background: #fff; margin: 0; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 28px 60px; }
h1 { font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 40px 0 12px; } h3 { font-size: 16px; margin: 22px 0 6px; }
.wide { overflow-x: auto; margin: 14px 0; }
table { border-collapse: collapse; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 11px; border-bottom: 1px solid #e3e3e3; vertical-align: top; }
th { text-align: left; font-weight: 500; white-space: nowrap; } thead th { font-weight: 700; border-bottom: 2px solid #555; }
.numbers td, .numbers thead th + th { text-align: right; }
.numbers thead th { white-space: normal; vertical-align: bottom; } .numbers td { white-space: nowrap; }
.text td, .samples td { white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; min-width: 130px; }
.section th { font-weight: 700; padding-top: 14px; border-bottom: 1px solid #999; }
.ratio { color: #0b5394; display: inline-block; min-width: 4em; padding-left: 6px; text-align: left; }
.warning { background: #fff4e0; border-left: 4px solid #d55e00; padding: 8px 14px; margin: 10px 0; }
figure { margin: 20px 0 30px; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: 14px; }
pre { background: #f6f6f6; padding: 10px 14px; font-size: 13px; overflow-x: auto; } summary { cursor: pointer; }
@media print { main { max-width: none; padding: 0; } body { font-size: 11pt; } table { font-size: 9pt; } th, td { padding: 2px 7px; }
  .wide { overflow: visible; } figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""


def to_page(title: str, blocks: list[tuple], figures: dict[str, bytes]) -> str:
    """The whole page: style and pictures inside, nothing fetched."""
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{CSS}</style></head>\n"
            f"<body><main><h1>{html.escape(title)}</h1>\n{to_html(blocks, figures)}\n</main></body></html>\n")
