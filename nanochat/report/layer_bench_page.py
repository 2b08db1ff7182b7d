"""The tables and the figure of scripts.layer_bench. result: the content of layer_bench.json."""

import math

from nanochat.report import plotting
from nanochat.report.bench_page import digits, draw_spreads, with_quartiles


def rank_text(bounds: dict) -> str:
    """'97 (90 to 105)', 'above 243', '230 (201 to above 243)'."""
    words = {"=": "", "<": "below ", ">": "above "}
    low, middle, high = (
        f"{words[bounds[key]['is']]}{bounds[key]['rank']:.0f}" for key in ("low", "median", "high")
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def case_title(case: dict) -> str:
    return "decoding, 1 token" if case["mode"] == "decoding" else f"training, {case['tokens']:,} tokens"


def cells(case: dict, variant: dict) -> dict[str, str]:
    """{column: text} for one rank of one case."""
    seconds = variant["seconds"]
    passes = [name for name in seconds if name != "total"]
    ratio = variant["ratio"]
    pieces = f", {case['rows']:,} at once" if case["rows"] < case["tokens"] else ""
    row = {
        "layer": f"{case['layers']} ({case['in']} → {case['out']}){pieces}",
        "rank": str(variant["rank"] or "dense"),
        "weights, MiB": digits(variant["weights_bytes"] / 2**20),
    }
    if case["mode"] == "training":
        row["kept for backward, MiB"] = digits(variant["kept_bytes"] / 2**20)
    row["MFLOP"] = digits(variant["flops"] / 1e6)
    row |= {f"{name}, ms": digits(1e3 * seconds[name]["median"]) for name in passes}
    if len(passes) > 1:
        row |= {f"{name} / dense": f"{ratio[name]['median']:.2f}" for name in passes}
    row["time / dense (quartiles)"] = with_quartiles(ratio["total"])
    row["FLOPs / dense"] = f"{ratio['flops']:.2f}"
    row["time ratio / FLOP ratio"] = f"{ratio['total over flops']:.2f}"
    if variant["rank"] == 0:  # dense has no ratio to itself
        row |= {column: "" for column in row if "/" in column}
    return row


def layer_tables(result: dict) -> list[tuple]:
    """Blocks of nanochat/report/page.py: the break-even ranks, then a table for each batch size."""
    cases_by_title = {}
    cases_by_layer = {}
    for case in result["cases"]:
        cases_by_title.setdefault(case_title(case), []).append(case)
        cases_by_layer.setdefault(case["layers"], []).append(case)
    rank_rows = []
    for layer, cases in cases_by_layer.items():
        ranks = [rank_text(case["break-even rank"]) for case in cases]
        flops_rank = f"{cases[0]['break-even rank']['flops']:.0f}"
        rank_rows.append([layer, f"{cases[0]['in']} → {cases[0]['out']}", *ranks, flops_rank])
    blocks = [
        ("subheading", "Break-even rank"),
        (
            "paragraph",
            "Below this rank, low rank takes less time than dense. It is interpolated between the measured "
            "ranks; in brackets: from the quartiles of the time ratio. “above” and “below”: outside of the "
            "measured ranks.",
        ),
        ("table", ["layer", "in → out", *cases_by_title, "by FLOPs"], rank_rows, "numbers"),
    ]
    for title, cases in cases_by_title.items():
        rows = [cells(case, variant) for case in cases for variant in case["variants"]]
        blocks.append(("subheading", title[0].upper() + title[1:]))
        blocks.append(("table", list(rows[0]), [list(row.values()) for row in rows], "numbers"))
    return blocks


def draw_layers(result: dict):
    """Time and FLOPs over those of dense, against rank; a panel a batch size, a line a layer."""
    titles = list(dict.fromkeys(map(case_title, result["cases"])))
    layers = list(dict.fromkeys(case["layers"] for case in result["cases"]))
    columns = min(3, len(titles))
    lines = math.ceil(len(titles) / columns)
    fig = plotting.new_figure(4.2 * columns + 0.6, 3.6 * lines + 0.7)
    panels = fig.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, title in zip(panels, titles):
        panel.axhline(1, color="#666666", linewidth=1)
        for case in result["cases"]:
            if case_title(case) == title:
                draw_case(panel, case, layers.index(case["layers"]))
        panel.set_title(title, fontsize=10.5)
        plotting.tidy(panel)
    # for all panels; after the drawing, since it ends the automatic scaling
    panels[0].set_xlim(left=0)
    panels[0].set_ylim(bottom=0)
    for panel in panels[len(titles) :]:
        panel.set_visible(False)
    for panel in panels[: len(titles)]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("rank")
    for panel in panels[::columns]:
        panel.set_ylabel("time, ratio to dense")
    handles, names = panels[0].get_legend_handles_labels()
    handles += panels[0].plot([], [], color="#666666", linestyle=":", linewidth=1.3)
    names.append("dotted: ratio of FLOPs")
    place = {"loc": "outside lower center", "ncols": 3}
    fig.legend(handles, names, frameon=False, fontsize=9.5, **place)
    return fig


def draw_case(panel, case: dict, i: int):
    """One layer at one batch size. i: colour and marker."""
    low_rank = case["variants"][1:]
    ranks = [variant["rank"] for variant in low_rank]
    flops = [variant["ratio"]["flops"] for variant in low_rank]
    colour = plotting.PALETTE[i % len(plotting.PALETTE)]
    panel.plot([0, *ranks], [0, *flops], color=colour, linestyle=":", linewidth=1.3)
    ratios = [variant["ratio"]["total"] for variant in low_rank]
    label = f"{case['layers']} ({case['in']} → {case['out']})"
    draw_spreads(panel, ranks, ratios, i, label)
