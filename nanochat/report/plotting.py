"""The parts of all figures of a report: colours, markers, points, lines, axes, labels, legends, the PNG.

Figures are made without pyplot.
"""

import io
from collections import Counter
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
from nanochat.report.summaries import depth, factored_groups, rank_words, ranks_in_order, spread, whiskers

# Okabe and Ito's colours without yellow, which is too pale on white. 7 colours and 4 line styles have no
# common divisor: 28 runs before a pair repeats, and neighbours differ in colour, line and marker.
BLACK = "#000000"
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", BLACK]
BRIGHT = PALETTE[:-1]  # for figures in which black means full rank
GREY = "#8a8a8a"
PALE_GREY = "#bbbbbb"
TEXT_GREY = "#555555"
LINE_STYLES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<", ">"]
POINT_STYLE = {
    "markeredgecolor": "white",
    "markeredgewidth": 0.6,
    "elinewidth": 1,
    "capsize": 2.5,
    "zorder": 3,
}

LABELLED = 10  # up to so many configurations are all labelled in full in one panel
LABEL_SIZE = 8.5  # points
LABEL_DISTANCES = (9, 18, 30, 44, 60, 80)  # points, from the middle of a marker
LABEL_SIDES = [  # (right, up, horizontal and vertical alignment)
    (1, 0, "left", "center"),
    (-1, 0, "right", "center"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (0.7, 0.7, "left", "bottom"),
    (-0.7, 0.7, "right", "bottom"),
    (0.7, -0.7, "left", "top"),
    (-0.7, -0.7, "right", "top"),
]


# ---- figures -----------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """Width and height in inches. Its canvas lets text be measured before the figure is saved."""
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def png(fig: Figure) -> bytes:
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=150, metadata={"Software": None})
    return out.getvalue()


def png_with_hotspots(fig: Figure, points: list) -> tuple[bytes, list]:
    """(PNG, [(x, y, text)]): each (panel, x, y, text) that its panel's frame shows.

    x, y: in the panel's units; returned as fractions of the picture's width and height from its top left.
    """
    fig.draw_without_rendering()
    fig.set_layout_engine("none")  # saving must not move the measured points
    hotspots = []
    for panel, x, y, text in points:
        pixel = panel.transData.transform((x, y))
        if panel.get_window_extent().padded(1).contains(*pixel):
            right, up = pixel / fig.bbox.size
            hotspots.append((round(float(right), 5), round(float(1 - up), 5), text))
    return png(fig), hotspots


def tidy(panel):
    """A pale grid below the data, no frame above and on the right."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e4e4e4", linewidth=0.7)
    panel.set_axisbelow(True)


def plain(text: str, longest: int = 40) -> str:
    """A run's name as matplotlib may draw it: no math, no lone surrogates, at most `longest` characters.

    It has no leading underscore, which would hide a legend entry.
    """
    text = text.encode("utf-8", "replace").decode()
    if len(text) > longest:
        text = text[: longest // 2] + "…" + text[-(longest // 2 - 1) :]
    text = text.replace("$", r"\$")
    return " " + text if text.startswith("_") else text


# ---- colours and markers -----------------------------------------------------------------------------------


def colour_and_marker(i: int) -> dict:
    """Style of the i-th run, the same in every figure."""
    return {"color": PALETTE[i % len(PALETTE)], "marker": marker(i)}


def marker(i: int) -> str:
    return MARKERS[i % len(MARKERS)]


def line_style(i: int) -> str:
    return LINE_STYLES[i % len(LINE_STYLES)]


def configuration_styles(configs: list[Configuration]) -> dict[str, dict]:
    """{configuration's name: colour and marker}: the colour tells the rank.

    The marker tells the depth, or if there is one depth, the rank again.
    """
    colours = rank_colours(configs)
    kinds = low_rank_kinds(configs)
    low_ranks = [words for words in ranks_in_order(configs) if words in kinds]
    depths = sorted({depth(c) for c in configs})
    styles = {}
    for c in configs:
        if len(depths) > 1:
            i = depths.index(depth(c))
        elif c.full_rank:
            i = 0
        else:
            i = 1 + low_ranks.index(rank_words(c))
        styles[c.name] = {"color": colours[rank_words(c)], "marker": marker(i)}
    return styles


def low_rank_kinds(configs: list[Configuration]) -> dict[str, tuple]:
    """{words for the rank: which matrices are factored}, without full rank."""
    return {rank_words(c): factored_groups(c) for c in configs if not c.full_rank}


def rank_colours(configs: list[Configuration]) -> dict[str, str]:
    """{words for the rank: colour}. Full rank is black, and grey with an MLP of another width.

    Of more ranks than there are colours, each combination of factored matrices has one, paler the lower the
    rank; a single combination has a scale of colours.
    """
    full = sorted({rank_words(c) for c in configs if c.full_rank} - {"full rank"})
    colours = {"full rank": BLACK}
    for i, words in enumerate(full):
        colours[words] = matplotlib.colors.to_hex((0.7 + 0.15 * i / len(full),) * 3)

    kinds = low_rank_kinds(configs)
    low = [words for words in ranks_in_order(configs) if words in kinds]
    distinct_kinds = list(dict.fromkeys(kinds[words] for words in low))
    for i, words in enumerate(low):
        if len(low) <= len(BRIGHT):
            colours[words] = BRIGHT[i]
        elif len(distinct_kinds) == 1:
            colours[words] = matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](0.9 * i / len(low)))
        else:
            same_kind = [other for other in low if kinds[other] == kinds[words]]
            colour = BRIGHT[distinct_kinds.index(kinds[words]) % len(BRIGHT)]
            colours[words] = paler(colour, 0.65 * (1 - (same_kind.index(words) + 1) / len(same_kind)))
    return colours


def paler(colour: str, white: float) -> str:
    """The colour with this share of white."""
    return matplotlib.colors.to_hex([part + white * (1 - part) for part in matplotlib.colors.to_rgb(colour)])


# ---- points and lines --------------------------------------------------------------------------------------


def draw_point(panel, seeds: list[tuple[float, float]], style: dict, opacity: float = 0.3):
    """The mean of the seeds' (x, y) with error bars, the seeds as smaller points. Returns the mean (x, y)."""
    xs = [x for x, _ in seeds]
    ys = [y for _, y in seeds]
    panel.errorbar(
        [fmean(xs)],
        [fmean(ys)],
        xerr=whiskers(xs),
        yerr=whiskers(ys),
        linestyle="none",
        markersize=7,
        **style,
        **POINT_STYLE,
    )
    if len(seeds) > 1:
        small = {"linestyle": "none", "markersize": 4, "markeredgewidth": 0, "zorder": 2}
        panel.plot(xs, ys, alpha=opacity, **style, **small)
    return fmean(xs), fmean(ys)


def draw_line(panel, points: list[tuple[float, list[float]]], **style):
    """A line through the means of (x, values), with error bars."""
    bars = [whiskers(values) for _, values in points]
    panel.errorbar(
        [x for x, _ in points],
        [fmean(values) for _, values in points],
        yerr=[[lower for (lower,), _ in bars], [upper for _, (upper,) in bars]],
        markersize=6,
        linewidth=1.4,
        **style,
        **POINT_STYLE,
    )


def draw_faint_line(panel, points: list[tuple[float, float]]):
    """A line without an entry in the legend."""
    panel.plot(*zip(*points), color=PALE_GREY, linewidth=0.7, zorder=1)


def mark_missing(panel, xs: list[float], color: str):
    """A × at the upper edge for each x that has no value."""
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
    """The mean of the values as a dashed horizontal line, their spread as a band; nothing without values."""
    if values:
        panel.axhspan(*spread(values), color=color, alpha=0.13, linewidth=0, zorder=0)
        panel.axhline(fmean(values), color=color, linewidth=1, linestyle="--", alpha=0.7, zorder=0.5)


def draw_stairs(panel, front: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto frontier: at each cost the best that costs no more. Returns points on it, as obstacles."""
    left, right = panel.get_xlim()
    corners = [(front[0][0], 10 * front[0][1])]
    for (x, y), (next_x, _) in zip(front, [*front[1:], (right, None)]):
        corners += [(x, y), (next_x, y)]
    panel.plot(*zip(*corners), color=GREY, linewidth=1.3, zorder=1, scaley=False)
    panel.set_xlim(left, right)
    return points_along(corners[1:])


def scaled(points: list[tuple[float, float]], size: float) -> list[tuple[float, float]]:
    """The points with x in units of `size`."""
    return [(x / size, y) for x, y in points]


# ---- axes --------------------------------------------------------------------------------------------------


def with_unit(quantity: str, unit: str) -> str:
    """The label of an axis."""
    return f"{quantity} ({unit})" if unit else quantity


def log_if_wide(axis, values: list[float]):
    """A logarithmic axis if the values span more than a factor of ten; else linear ticks are clearer."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        log_axis(axis)


def log_axis(axis, ticks=(1, 2, 5)):
    """ticks: their places within each decade."""
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def limit_height(panel, series: list[list[float]], levels: list[float] = ()):
    """A y-range for points with error bars, each a list of values.

    Means far above the median would squeeze all others together: they are outside the frame, and a note says
    how many. `levels` are always inside.
    """
    means = sorted(map(fmean, series))
    top = max(means[0] + 3 * (means[len(means) // 2] - means[0]), 1.25 * means[0], *levels)
    inside = [spread(values) for values in series if fmean(values) <= top]
    low = min(low for low, _ in inside)
    high = max(high for _, high in inside)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1
    panel.set_ylim(low - margin, high + margin)
    outside = [mean for mean in means if mean > high + margin]
    if outside:
        write_in_corner(panel, f"{len(outside)} above the frame")


# ---- words in a panel --------------------------------------------------------------------------------------


def write_in_middle(panel, text: str):
    """The reason why a panel is empty."""
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color="#666666")


def write_in_corner(panel, text: str):
    """A note at the top right, inside the frame."""
    place = {"transform": panel.transAxes, "ha": "right", "va": "top"}
    panel.text(0.99, 0.985, text, fontsize=LABEL_SIZE, color=TEXT_GREY, **place)


def write_on_level(panel, level: float, text: str):
    """At the right end of a horizontal line, above it."""
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
    panel.annotate(text, (1, level), (-2, 2), fontsize=LABEL_SIZE, color=TEXT_GREY, **place)


def short_labels(configs: list[Configuration]) -> dict[str, str]:
    """{configuration's name: its label}: the parts of the name that the legend does not show.

    Many configurations: only the parts that fewer than half of them have.
    """
    has_full_labels = len(configs) <= LABELLED
    ranks = {rank_words(c) for c in configs if not c.full_rank}
    depths = {depth(c) for c in configs}
    rate_flags = [key for key in varying_settings(configs) if key.endswith("_lr")]
    counts = Counter(part for c in configs for part in c.name.split(", "))
    labels = {}
    for c in configs:
        layers = f"{depth(c)} layers"
        parts = []
        if has_full_labels or len(ranks) > len(BRIGHT):
            parts.append(rank_words(c))
        if has_full_labels and len(depths) > 1:
            parts.append(layers)
        legend_parts = [*rank_name(c.settings).split(", "), layers]
        name_parts = [part for part in c.name.split(", ") if part not in legend_parts]
        parts += [part for part in name_parts if has_full_labels or counts[part] < len(configs) / 2]
        labels[c.name] = ", ".join(parts)
        if len(rate_flags) == 1:
            labels[c.name] = labels[c.name].replace(rate_flags[0].replace("_", " "), "lr")
    return labels


def label_points(panel, points: list, obstacles: list, fontsize: float = LABEL_SIZE):
    """Write each (x, y, text) beside its point, where it covers the fewest obstacles, points and texts.

    points, obstacles [(x, y)]: in the panel's units. Call fig.draw_without_rendering() first: it settles the
    layout, and places are measured in pixels.
    """
    fig = panel.figure
    frame = panel.get_window_extent()
    dots = panel.transData.transform([*obstacles, *((x, y) for x, y, _ in points)])
    places = list(product(LABEL_DISTANCES, LABEL_SIDES))
    renderer = fig.canvas.get_renderer()
    written = [text.get_window_extent(renderer) for text in panel.texts]  # boxes in pixels
    for x, y, text in points:
        point = panel.transData.transform((x, y))
        if not text or not frame.contains(*point):
            continue
        line = {"arrowstyle": "-", "color": "#777777", "linewidth": 0.6, "shrinkB": 3}
        label = panel.annotate(
            plain(text, 60),
            (x, y),
            (0, 0),
            textcoords="offset points",
            fontsize=fontsize,
            zorder=6,
            arrowprops=line,
        )
        label.set_in_layout(False)
        # the text's extent: the annotation's own would include the line to its point
        size = Text.get_window_extent(label, renderer).size
        boxes = [label_box(point, size, distance * fig.dpi / 72, side) for distance, side in places]
        costs = [label_cost(box, frame, dots, written) for box in boxes]
        best = min(range(len(places)), key=lambda i: costs[i] + places[i][0] / 40)
        distance, (right, up, horizontal, vertical) = places[best]
        label.set(position=(right * distance, up * distance), ha=horizontal, va=vertical)
        label.arrow_patch.set_visible(distance > LABEL_DISTANCES[0])
        written.append(boxes[best])


def label_box(point, size, distance: float, side: tuple) -> Bbox:
    """Where a text of this size stands at a side of a point, all in pixels."""
    right, up, horizontal, vertical = side
    width, height = size
    x = point[0] + right * distance - {"left": 0, "center": width / 2, "right": width}[horizontal]
    y = point[1] + up * distance - {"bottom": 0, "center": height / 2, "top": height}[vertical]
    return Bbox.from_bounds(x, y, width, height)


def label_cost(box: Bbox, frame: Bbox, dots, written: list[Bbox]) -> float:
    """1 for each dot under the label, 4 for each text, 12 if it leaves the frame. dots: (n, 2) pixels."""
    wide = box.padded(3)
    cost = ((dots > wide.min) & (dots < wide.max)).all(axis=1).sum()
    cost += 4 * len([other for other in written if wide.overlaps(other)])
    is_inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
    return cost if is_inside else cost + 12


def points_along(corners: list[tuple[float, float]], pieces: int = 12) -> list[tuple[float, float]]:
    """Points on the segments between the corners: a line as obstacles of labels."""
    return [
        (x0 + (x1 - x0) * i / pieces, y0 + (y1 - y0) * i / pieces)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:])
        for i in range(pieces + 1)
    ]


def points_on_error_bars(seeds: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The error bars of draw_point as obstacles of labels."""
    xs = [x for x, _ in seeds]
    ys = [y for _, y in seeds]
    upright = points_along([(fmean(xs), y) for y in spread(ys)])
    return upright + points_along([(x, fmean(ys)) for x in spread(xs)])


def points_on_level(panel, level: float) -> list[tuple[float, float]]:
    """A horizontal line as obstacles of labels."""
    return points_along([(x, level) for x in panel.get_xlim()], 60)


# ---- legends -----------------------------------------------------------------------------------------------


def legend_below(fig, handles: list, **options):
    """Below the panels, in as many columns as the figure is wide enough for."""
    columns = legend_columns([handle.get_label() for handle in handles], fig.get_figwidth())
    options = {"frameon": False, "fontsize": 9, **options}
    fig.legend(handles=handles, loc="outside lower center", ncols=columns, **options)


def legend_columns(labels: list[str], width: float) -> int:
    """How many entries fit side by side into a figure of this width in inches."""
    widest = max(map(len, labels))
    return max(1, min(len(labels), int(12 * width / (widest + 8))))


def rank_handles(panel, configs: list[Configuration], styles: dict) -> list:
    """Legend entries of configuration_styles: ranks by colour and, of several depths, depths by marker."""
    depths = sorted({depth(c) for c in configs})
    handles = []
    for words in ranks_in_order(configs):
        style = styles[next(c.name for c in configs if rank_words(c) == words)]
        if len(depths) > 1:
            style = {**style, "marker": "o"}
        handles += panel.plot([], [], linestyle="none", **style, markersize=7, label=plain(words))
    if len(depths) > 1:
        for i, layers in enumerate(depths):
            style = {"color": GREY, "marker": marker(i), "linestyle": "none", "markersize": 7}
            handles += panel.plot([], [], **style, label=f"{layers} layers")
    return handles


def baseline_handle() -> Patch:
    """Legend entry of draw_band."""
    return Patch(color=BLACK, alpha=0.15, linewidth=0, label="baseline, with its spread")
