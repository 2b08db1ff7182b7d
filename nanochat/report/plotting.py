"""What the pictures of a study are drawn with: a point over its seeds, the baseline's band, axes, labels, hover places."""

import io
from itertools import product
from statistics import fmean

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from nanochat.report.configurations import Configuration, rank_name, varying_settings
from nanochat.report.summaries import (
    depth,
    factored_groups,
    mean_rank,
    rank_words,
    ranks_in_order,
    run_points,
    spread,
    whiskers,
)

# Okabe and Ito's colours without yellow (too pale on white). 7 colours and 4 line styles have no common divisor:
# 28 runs before a pair repeats, and neighbours differ in colour, line and marker.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
LABEL_SIDES = [
    (1, 0, "left", "center"),
    (-1, 0, "right", "center"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (0.7, 0.7, "left", "bottom"),
    (-0.7, 0.7, "right", "bottom"),
    (0.7, -0.7, "left", "top"),
    (-0.7, -0.7, "right", "top"),
]
BLACK = "#000000"
GREY = "#8a8a8a"
FEW_RANKS = len(COLOURS) - 1  # colours without black
FEW = 10  # configurations that can all be named in full in a picture


# ---- figures -------------------------------------------------------------------------------------------------


def png(fig: Figure) -> bytes:
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Inches. The canvas is attached here so that text can be measured before the figure is saved."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def tidy(panel):
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e4e4e4", linewidth=0.7)
    panel.set_axisbelow(True)


def plain(text: str, longest: int = 40) -> str:
    """A run's name as matplotlib may draw it: no math, no half characters, not endless, and no leading
    underscore, which would hide a legend entry.
    """
    text = text.encode("utf-8", "replace").decode()
    if len(text) > longest:
        text = text[: longest // 2] + "…" + text[-(longest // 2 - 1) :]
    text = text.replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def colour_and_marker(i: int) -> dict:
    """The i-th run looks the same in every figure."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def say_empty(panel, text):
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="#666666")


# ---- how configurations look ---------------------------------------------------------------------------------


def looks(configs: list[Configuration]) -> dict[str, dict]:
    """{configuration's name: colour and marker}: the colour tells the rank (black: full; grey: with another MLP), the marker the depth, or again the rank.

    Of many ranks: one colour for each combination of factored matrices, paler the lower the rank; of one combination a scale of colours.
    """
    ranks = {rank_words(c): factored_groups(c) for c in sorted(configs, key=mean_rank) if not c.full_rank}
    ranks = {words: ranks[words] for words in ranks_in_order(configs) if words in ranks}
    kinds = list(dict.fromkeys(ranks.values()))
    depths = sorted({depth(c) for c in configs})
    full = sorted({rank_words(c) for c in configs if c.full_rank} - {"full rank"})
    colours = {
        words: matplotlib.colors.to_hex((0.7 + 0.15 * i / len(full),) * 3) for i, words in enumerate(full)
    }
    for i, (words, kind) in enumerate(ranks.items()):
        alike = [other for other in ranks if ranks[other] == kind]
        if len(ranks) <= FEW_RANKS:
            colours[words] = COLOURS[i]
        elif len(kinds) > 1:
            red, green, blue = matplotlib.colors.to_rgb(COLOURS[kinds.index(kind) % FEW_RANKS])
            pale = 0.65 * (1 - (alike.index(words) + 1) / len(alike))
            colours[words] = matplotlib.colors.to_hex([c + pale * (1 - c) for c in (red, green, blue)])
        else:
            colours[words] = matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](0.9 * i / len(ranks)))
    found = {}
    for c in configs:
        marker = (
            depths.index(depth(c))
            if len(depths) > 1
            else 0
            if c.full_rank
            else 1 + list(ranks).index(rank_words(c))
        )
        found[c.name] = {"color": colours.get(rank_words(c), BLACK), "marker": MARKERS[marker % len(MARKERS)]}
    return found


def short_labels(configs: list[Configuration]) -> dict[str, str]:
    """{name: what the legend's colours and markers do not tell}: of many configurations only what is unusual about each."""
    many = len(configs) > FEW
    ranks = {rank_words(c) for c in configs if not c.full_rank}
    depths = {depth(c) for c in configs}
    rates = {key for key in varying_settings(configs) if key.endswith("_lr")}
    found = {}
    for c in configs:
        known = rank_name(c.settings).split(", ") + [f"{depth(c)} layers"]
        rest = [part for part in c.name.split(", ") if part not in known]
        rest = [
            part
            for part in rest
            if not many or sum(part in other.name.split(", ") for other in configs) < len(configs) / 2
        ]
        told = [
            *([rank_words(c)] if not many or len(ranks) > FEW_RANKS else []),
            *([known[-1]] if not many and len(depths) > 1 else []),
        ]
        found[c.name] = ", ".join(told + rest)
        if len(rates) == 1:
            found[c.name] = found[c.name].replace(rates.copy().pop().replace("_", " "), "lr")
    return found


# ---- points and bands -----------------------------------------------------------------------------------------------


def draw_point(
    panel, config: Configuration, x_key: str, y_key: str, size: float, look: dict, opacity: float = 0.3
) -> tuple[float, float]:
    """The means over the seeds with error bars, and the seeds as smaller points of that opacity. Returns the means, x in units of `size`."""
    points = run_points(config, x_key, y_key)
    xs = [x / size for x, _ in points]
    ys = [y for _, y in points]
    panel.errorbar(
        [fmean(xs)],
        [fmean(ys)],
        xerr=whiskers(xs),
        yerr=whiskers(ys),
        **look,
        linestyle="none",
        markersize=7,
        elinewidth=1,
        capsize=2.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
    )
    if len(points) > 1:
        panel.plot(xs, ys, **look, linestyle="none", alpha=opacity, markersize=4, markeredgewidth=0, zorder=2)
    return fmean(xs), fmean(ys)


def draw_line(panel, points: list[tuple[float, list[float]]], **look):
    """A line through the means of (x, values), with error bars."""
    bars = [
        [end for low_high in (whiskers(values) for _, values in points) for end in low_high[side]]
        for side in (0, 1)
    ]
    panel.errorbar(
        [x for x, _ in points],
        [fmean(values) for _, values in points],
        yerr=bars,
        **look,
        markersize=6,
        linewidth=1.4,
        elinewidth=1,
        capsize=2.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        zorder=3,
    )


def mark_at_top(panel, xs: list[float], color: str):
    """A × at the upper edge for what has no value."""
    panel.plot(
        xs,
        [0.97] * len(xs),
        linestyle="none",
        marker="x",
        color=color,
        transform=panel.get_xaxis_transform(),
        zorder=4,
    )


def draw_band(panel, values: list[float], color: str = BLACK):
    """The mean of the values as a dashed horizontal line, their spread as a band."""
    if values:
        panel.axhspan(*spread(values), color=color, alpha=0.13, linewidth=0, zorder=0)
        panel.axhline(fmean(values), color=color, linewidth=1, linestyle="--", alpha=0.7, zorder=0.5)


def draw_stairs(panel, front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The frontier as the best that can be had at each cost. Returns points along it, for labels to keep clear of."""
    limits = panel.get_xlim()
    corners = [(front[0][0], 10 * front[0][1])]
    for (x, y), (next_x, _) in zip(front, [*front[1:], (limits[1], None)]):
        corners += [(x, y), (next_x, y)]
    panel.plot(*zip(*corners), color=GREY, linewidth=1.3, zorder=1, scaley=False)
    panel.set_xlim(limits)
    return along(corners[1:])


def along(corners: list[tuple[float, float]], pieces: int = 12) -> list[tuple[float, float]]:
    """Points along the segments between the corners."""
    return [
        (x0 + (x1 - x0) * i / pieces, y0 + (y1 - y0) * i / pieces)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:])
        for i in range(pieces + 1)
    ]


# ---- axes -----------------------------------------------------------------------------------------------------------


def log_if_wide(axis, values: list[float]):
    """A logarithmic axis where the values span more than a factor of ten; below that linear ticks read better."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        log_axis(axis)


def log_axis(axis, subs=(1, 2, 5)):
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def cut_above(panel, series: list[list[float]], needed: list[float] = ()):
    """A y-range for points with error bars (a list of values each) in which means far above the median, which would squeeze all others
    together, leave the frame; it says how many do. `needed` values are always shown.
    """
    means = sorted(map(fmean, series))
    top = max(means[0] + 3 * (means[len(means) // 2] - means[0]), 1.25 * means[0], *needed)
    ends = [spread(values) for values in series if fmean(values) <= top]
    low = min(low for low, _ in ends)
    high = max(high for _, high in ends)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1
    panel.set_ylim(low - margin, high + margin)
    if above := sum(mean > high + margin for mean in means):
        panel.text(
            0.99,
            0.985,
            f"{above} above the frame",
            transform=panel.transAxes,
            ha="right",
            va="top",
            fontsize=8.5,
            color="#555555",
        )


def fences(config: Configuration, x_key: str, y_key: str, size: float) -> list[tuple[float, float]]:
    """Points along the error bars, for labels to keep clear of."""
    xs = [x / size for x in config.values(x_key)]
    ys = config.values(y_key)
    return along([(fmean(xs), y) for y in spread(ys)]) + along([(x, fmean(ys)) for x in spread(xs)])


def across(panel, level: float | None) -> list[tuple[float, float]]:
    """Points along a horizontal line, for the same end."""
    return along([(x, level) for x in panel.get_xlim()], 60) if level is not None else []


# ---- words ----------------------------------------------------------------------------------------------------------


def label_points(fig, panel, points: list, obstacles: list):
    """Write each (x, y, text) beside its point, where it covers the least of `obstacles` [(x, y)] and of what is already written.

    The layout must be settled (fig.draw_without_rendering()), so that pixels mean something.
    """
    frame = panel.get_window_extent()
    pixels = fig.dpi / 72
    dots = panel.transData.transform([*obstacles, *((x, y) for x, y, _ in points)])
    placed = []
    for x, y, text in points:
        spot = panel.transData.transform((x, y))
        if not text or not frame.contains(*spot):
            continue
        note = panel.annotate(
            plain(text, 60),
            (x, y),
            (0, 0),
            textcoords="offset points",
            fontsize=8.5,
            zorder=6,
            arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.6, "shrinkB": 3},
        )
        note.set_in_layout(False)
        size = Text.get_window_extent(
            note, fig.canvas.get_renderer()
        )  # the annotation's own extent would include its leader line
        best = None
        for distance, (dx, dy, ha, va) in product((8, 18, 30, 44, 60, 80), LABEL_SIDES):
            left = (
                spot[0]
                + dx * distance * pixels
                - {"left": 0, "center": size.width / 2, "right": size.width}[ha]
            )
            bottom = (
                spot[1]
                + dy * distance * pixels
                - {"bottom": 0, "center": size.height / 2, "top": size.height}[va]
            )
            area = Bbox.from_bounds(left, bottom, size.width, size.height)
            near = area.padded(3)
            faults = 4 * sum(near.overlaps(other) for other in placed) + distance / 40
            faults += ((dots > near.min) & (dots < near.max)).all(axis=1).sum()
            faults += 12 * (
                frame.x0 > area.x0 or area.x1 > frame.x1 or frame.y0 > area.y0 or area.y1 > frame.y1
            )
            if best is None or faults < best[0]:
                best = (
                    faults,
                    area,
                    {"position": (dx * distance, dy * distance), "ha": ha, "va": va},
                    distance,
                )
        _, area, where, distance = best
        note.set(**where)
        note.arrow_patch.set_visible(distance > 8)
        placed.append(area)


def legend_below(
    fig, configs: list[Configuration], style: dict, base: Configuration | None = None, more: list = ()
):
    """Below the panels: ranks by colour, depths by marker, `more` handles, and the band if there is a baseline."""
    depths = sorted({depth(c) for c in configs})
    panel = fig.axes[0]
    handles = []
    for words in ranks_in_order(configs):
        look = style[next(c.name for c in configs if rank_words(c) == words)]
        look = look if len(depths) == 1 else {**look, "marker": "o"}
        handles += panel.plot([], [], linestyle="none", **look, markersize=7, label=plain(words))
    for i, layers in enumerate(depths if len(depths) > 1 else []):
        handles += panel.plot(
            [],
            [],
            linestyle="none",
            color=GREY,
            marker=MARKERS[i % len(MARKERS)],
            markersize=7,
            label=f"{layers} layers",
        )
    handles += [
        *more,
        *([Patch(color=BLACK, alpha=0.15, linewidth=0, label="baseline, with its spread")] if base else []),
    ]
    key_below(fig, handles)


def key_below(fig, handles: list, **options):
    """A legend below the panels, in as many columns as the figure is wide enough for."""
    widest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(12 * fig.get_figwidth() / (widest + 8))))
    fig.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, **options
    )


def finish(fig, spots: list) -> tuple[bytes, list]:
    """(PNG, hotspots): each (panel, x, y, text), in the panel's units, becomes a place in the picture, if the frame shows it."""
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # what stands now stays where it stands
    places = []
    for panel, x, y, text in spots:
        dot = panel.transData.transform((x, y))
        if panel.get_window_extent().padded(1).contains(*dot):
            across, up = dot / fig.bbox.size
            places.append((round(float(across), 5), round(float(1 - up), 5), text))
    return png(fig), places
