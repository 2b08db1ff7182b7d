"""What a report shows of runs that train a part of their numbers: configurations in, a section of the page and its pictures out."""

import math
from statistics import fmean

from nanochat.history import series
from nanochat.naming import line_name, method
from nanochat.report.configurations import Configuration, finished, run_seed, run_value
from nanochat.report.plotting import (
    BLACK,
    COLOURS,
    GREY,
    LINES,
    MARKERS,
    draw_band,
    draw_line,
    finish,
    key_below,
    label_points,
    log_axis,
    new_figure,
    plain,
    tidy,
)
from nanochat.report.statistics import d90, loss_at_start, rank_grid, rank_shares, spearman, spearman_interval
from nanochat.report.summaries import baseline, hover_text, mean_over_runs, outcome, rank_words
from nanochat.units import COUNT, human, is_finite, unit_of

BITS = [(1, "bit"), (1e3, "kbit"), (1e6, "Mbit"), (1e9, "Gbit")]
CURVES = 12  # adapters whose curves are drawn in colour; the others are faint
CAPTIONS = {
    "trained.png": "Final loss against the numbers that were trained and the bits that have to be stored. Circles start from scratch, squares from a "
    "trained model: theirs is what is stored beside that model, and the training of the model is not counted. Uniform and unigram: "
    "what knows nothing, and what knows the frequencies of the tokens, would lose.",
    "subspace.png": "Final loss against the dimension of the random subspace. Dashed: all weights trained, with its spread over seeds; dotted: where "
    "90% of the way there, from the loss of the untrained model, is gone.",
    "adalora_ranks.png": "AdaLoRA's final ranks, means over seeds; bars: sums by layer and by matrix. For an encoder fine-tuned on understanding "
    "tasks Zhang et al. (arXiv 2303.10512) found most rank in upper layers and in the MLP.",
    "untrained.png": "Does the perplexity of a layer map before any training predict the one after its adapter is trained? A point a layer map.",
    "adapted.png": "Validation loss of adapters from step 0, the base as its layer map leaves it, means over seeds.",
}


def method_section(configs: list[Configuration], measure: str) -> tuple[list[tuple], dict]:
    """(blocks of the page, {file name: (PNG bytes, hotspots)}), of the finished runs; both empty where all runs are ordinary ones.

    measure: "loss" where losses may be compared; else only ranks are shown.
    """
    configs = [c for c in configs if any(map(finished, c.runs))]
    if not any(c.method for c in configs):
        return [], {}
    makers = [trained_part, subspace_part, untrained_part, curves_part] if measure == "loss" else []
    blocks = [("heading", "What is trained")]
    figures = {}
    for make in (*makers, ranks_part):
        if made := make(configs):
            name, figure, words = made
            figures[name] = finish(*figure)
            blocks += [("figure", name, CAPTIONS[name]), *words]
    return (blocks, figures) if figures else ([], {})


# ---- loss against what is trained and stored ------------------------------------------------------------------------


def trained_numbers(run) -> float | None:
    return run_value(run, "params/trained") or run_value(run, "params/total")


def stored_bits(run) -> float | None:
    total = run_value(run, "params/total")
    return run_value(run, "params/stored_bits") or (32 * total if total else None)


def trained_in_blocks(run) -> float | None:
    """What is trained beside embedding and head, which a subspace leaves as they are."""
    trained = trained_numbers(run)
    flags = run.config.get("flags", {})
    apart = [run_value(run, f"params/{part}") for part in ("embedding", "lm_head")]
    return (
        trained
        if trained is None or flags.get("adapter") or flags.get("freeze_embeddings")
        else max(0, trained - sum(filter(None, apart)))
    )


def kind(c: Configuration) -> str:
    return (
        method(c.settings)
        or " and ".join(filter(None, ["low rank" if c.low_rank else "", "tied layers" if tied(c) else ""]))
        or "full rank"
    )


def tied(c: Configuration) -> bool:
    return bool(c.settings.get("layer_map")) and not c.method


def trained_part(configs: list[Configuration]):
    """Final loss against what is trained (with subspaces also: in the blocks) and against what is stored."""
    shown = [
        c
        for c in configs
        if c.values("val/loss") and mean_over_runs(c, trained_numbers) and mean_over_runs(c, stored_bits)
    ]
    if len(shown) < 2 or all(mean_over_runs(c, trained_numbers) == c.mean("params/total") for c in shown):
        return None
    axes_ = [(trained_numbers, "trained parameters", COUNT), (stored_bits, "stored bits", BITS)]
    if any(c.settings.get("subspace") for c in shown):
        axes_.insert(0, (trained_in_blocks, "trained parameters, without embedding and head", COUNT))
    kinds = sorted(dict.fromkeys(map(kind, shown)), key=lambda name: name == "full rank")
    colours = {
        name: BLACK if name == "full rank" else COLOURS[i % (len(COLOURS) - 1)]
        for i, name in enumerate(kinds)
    }
    fig = new_figure(5.6 * len(axes_), 6)
    spots = []
    labels = []
    panels = fig.subplots(1, len(axes_), sharey=True)
    for panel, (quantity, words, ladder) in zip(panels, axes_):
        at = {c.name: x for c in shown if (x := mean_over_runs(c, quantity))}
        for c in shown:
            if c.name not in at:  # nothing, which has no place on a logarithmic axis
                panel.axhline(
                    c.mean("val/loss"), color=colours[kind(c)], linewidth=1, linestyle=":", zorder=0.5
                )
                panel.annotate(
                    f"0: {short_name(c)}",
                    (0, c.mean("val/loss")),
                    (4, 2),
                    xycoords=("axes fraction", "data"),
                    textcoords="offset points",
                    fontsize=8.5,
                )
                continue
            draw_line(
                panel,
                [(at[c.name], c.values("val/loss"))],
                color=colours[kind(c)],
                marker="s" if c.settings.get("adapter") else "o",
                linestyle="none",
            )
            spots.append(
                (panel, at[c.name], c.mean("val/loss"), f"{hover_text(c, 'loss')}\n{words} {at[c.name]:,.0f}")
            )
        log_axis(panel.xaxis, subs=(1,) if max(at.values()) > 100 * min(at.values()) else (1, 2, 5))
        panel.xaxis.set_major_formatter(
            lambda x, _, ladder=ladder: f"{x / unit_of(x, ladder)[0]:g} {unit_of(x, ladder)[1]}".rstrip()
        )
        panel.margins(x=0.15)
        panel.set_xlabel(words)
        tidy(panel)
        points = [(at[c.name], c.mean("val/loss"), short_name(c)) for c in shown if c.name in at]
        best = {
            (x, name): min(y for x_, y, name_ in points if (x_, name_) == (x, name)) for x, _, name in points
        }
        labels.append((panel, [(x, y, name if y == best[x, name] else "") for x, y, name in points]))
    draw_references(panels, references(configs))
    panels[0].set_ylabel("validation loss (nats/token)")
    key_below(
        fig,
        [panels[0].plot([], [], color=colours[k], marker="o", linestyle="none", label=k)[0] for k in kinds],
    )
    fig.draw_without_rendering()
    for panel, points in labels:
        label_points(fig, panel, points, [(x, y) for x, y, _ in points])
    rows = [
        [
            c.name,
            f"{mean_over_runs(c, trained_numbers):,.0f}",
            f"{mean_over_runs(c, trained_in_blocks):,.0f}",
            human(mean_over_runs(c, stored_bits), BITS),
            f"{c.mean('val/loss'):.4f}",
            outcome(c, "val/ppl"),
        ]
        for c in sorted(shown, key=lambda c: (mean_over_runs(c, trained_numbers), c.mean("val/loss")))
    ]
    header = [
        "configuration",
        "trained",
        "without embedding and head",
        "stored",
        "validation loss",
        "perplexity",
    ]
    return "trained.png", (fig, spots), [("table", header, rows, "numbers")]


def short_name(c: Configuration) -> str:
    return rank_words(c) + (f", {len(c.settings['layer_map'].split(','))} positions" if tied(c) else "")


def references(configs: list[Configuration]) -> dict[str, float]:
    """Nats per token of what knows nothing of the text, as the first run that has them on record says."""
    found = next(
        (losses for c in configs for run in c.runs if (losses := run.config.get("reference_losses"))), {}
    )
    return {name: level for name, level in found.items() if is_finite(level)}


def draw_references(panels, levels: dict[str, float]):
    """Dashed lines; those far above all points, which they would squeeze together, in words."""
    low, high = panels[0].get_ylim()
    near = {name: level for name, level in levels.items() if level <= high + 0.6 * (high - low)}
    panels[0].set_ylim(low, max([high, *(level + 0.05 * (high - low) for level in near.values())]))
    for panel in panels:
        for name, level in near.items():
            panel.axhline(level, color=GREY, linewidth=1, linestyle="--", zorder=0.5)
            panel.annotate(
                f"{name} {level:.2f}",
                (1, level),
                (-2, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize=8.5,
                color="#555555",
            )
    low, high = panels[0].get_ylim()
    if far := [f"{name} {level:.2f}" for name, level in levels.items() if name not in near]:
        panels[-1].text(
            0.99,
            0.985,
            f"above the frame: {', '.join(far)}",
            transform=panels[-1].transAxes,
            ha="right",
            va="top",
            fontsize=8.5,
            color="#555555",
        )
        panels[0].set_ylim(low, high + 0.05 * (high - low))


# ---- loss against the dimension of a subspace -----------------------------------------------------------------------


def subspace_part(configs: list[Configuration]):
    lines = {}
    for c in configs:
        if (
            is_finite(c.settings.get("subspace_dim"))
            and c.settings["subspace_dim"] > 0
            and c.settings.get("subspace") not in (None, "", "none", "lora-random")
            and c.values("val/loss")
        ):
            lines.setdefault(line_name(c.settings), []).append(c)
    if not any(len(line) > 1 for line in lines.values()):
        return None
    full = baseline(configs, "val/ppl")
    spots = []
    fig = new_figure(8.5, 5.6)
    panel = fig.subplots()
    handles = []
    for i, (name, line) in enumerate(lines.items()):
        line.sort(key=lambda c: c.settings["subspace_dim"])
        look = {
            "color": COLOURS[i % (len(COLOURS) - 1)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i % len(LINES)],
        }
        draw_line(panel, [(c.settings["subspace_dim"], c.values("val/loss")) for c in line], **look)
        handles += panel.plot([], [], **look, label=name)
        spots += [
            (panel, c.settings["subspace_dim"], c.mean("val/loss"), hover_text(c, "loss")) for c in line
        ]
    log_axis(panel.xaxis, subs=(1,))
    draw_band(panel, full.values("val/loss") if full else [])
    rows = d90_rows(lines, full)
    starts = [s for line in lines.values() for c in line for run in c.runs if (s := loss_at_start(run))]
    if full and starts:
        level = fmean(starts) - 0.9 * (fmean(starts) - full.mean("val/loss"))
        panel.axhline(level, color=GREY, linewidth=1, linestyle=":")
        panel.annotate(
            "90%",
            (1, level),
            (-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8.5,
            color="#555555",
        )
    panel.set_xlabel("dimension of the subspace")
    panel.set_ylabel("validation loss (nats/token)")
    tidy(panel)
    key_below(fig, handles, handlelength=3.2)
    words = (
        "d90: the smallest dimension whose loss closes 90% of the way from the untrained model's to that of all weights trained under the same "
        "seed; interpolated in the logarithm between the dimensions tried. ≤: the smallest one tried does already."
    )
    table = (
        [
            ("paragraph", words),
            (
                "table",
                ["method", "seed", "loss at the start", "all weights", "wanted", "d90"],
                rows,
                "numbers",
            ),
        ]
        if rows
        else [
            (
                "paragraph",
                "No d90: there is no finished run in which all weights are trained, under a seed of these.",
            )
        ]
    )
    return "subspace.png", (fig, spots), table


def d90_rows(lines: dict[str, list[Configuration]], full: Configuration | None) -> list[list[str]]:
    """A row for each method and seed that full rank has too."""
    rows = []
    of_full = (
        {run_seed(run): run_value(run, "val/loss") for run in full.runs if finished(run)} if full else {}
    )
    for name, line in lines.items():
        runs = [
            (c.settings["subspace_dim"], run)
            for c in line
            for run in c.runs
            if finished(run) and run_value(run, "val/loss") is not None
        ]
        for s in sorted({run_seed(run) for _, run in runs if of_full.get(run_seed(run)) is not None}):
            points = [(d, run_value(run, "val/loss")) for d, run in runs if run_seed(run) == s]
            start = loss_at_start(next(run for _, run in runs if run_seed(run) == s))
            if start is None:
                continue
            found = d90(points, start, of_full[s])
            most = max(points)[0]
            shown = (
                f"not reached (largest tried: {most:,.0f})"
                if found is None
                else ("≤ " if found == min(points)[0] else "") + f"{found:,.0f}"
            )
            rows.append(
                [
                    name,
                    str(s),
                    f"{start:.4f}",
                    f"{of_full[s]:.4f}",
                    f"{start - 0.9 * (start - of_full[s]):.4f}",
                    shown,
                ]
            )
    return rows


# ---- layer maps before and after ------------------------------------------------------------------------------------


def untrained_part(configs: list[Configuration]):
    groups = {}
    for c in configs:
        if c.settings.get("adapter") and mean_over_runs(c, at_start) and c.values("val/ppl"):
            rest = tuple(
                sorted(
                    (k, str(v))
                    for k, v in c.settings.items()
                    if k not in ("layer_map", "layer_kinds", "depth")
                )
            )
            groups.setdefault(rest, []).append(c)
    groups = [group for group in groups.values() if len({c.settings.get("layer_map") for c in group}) > 2][:3]
    if not groups:
        return None
    fig = new_figure(6.5 * len(groups) if len(groups) > 1 else 8, 5.4)
    spots = []
    words = []
    panels = fig.subplots(1, len(groups), squeeze=False)[0]
    for panel, group in zip(panels, groups):
        points = [(mean_over_runs(c, at_start), c.mean("val/ppl")) for c in group]
        for i, (x, y) in enumerate(points):
            panel.plot([x], [y], color=COLOURS[0], marker="o", linestyle="none", markeredgecolor="white")
            spots.append((panel, x, y, f"{hover_text(group[i], 'loss')}\nuntrained {x:.2f}"))
        log_axis(panel.xaxis)
        panel.margins(0.12)
        name = f"{method(group[0].settings)} on {group[0].settings.get('base')}"
        said = f"{name}: Spearman's rank correlation {rho_words(points)}"
        panel.set_title(said.replace(": ", "\n", 1), fontsize=10)
        words.append(said + ".")
        panel.set_xlabel("perplexity of the map, untrained")
        panel.set_ylabel("perplexity with its adapter")
        tidy(panel)
    fig.draw_without_rendering()
    for panel, group in zip(panels, groups):
        points = [
            (mean_over_runs(c, at_start), c.mean("val/ppl"), c.settings.get("layer_map") or "as it is")
            for c in group
        ]
        label_points(fig, panel, points, [(x, y) for x, y, _ in points])
    return (
        "untrained.png",
        (fig, spots),
        [
            ("list", words),
            (
                "paragraph",
                "The interval is a percentile bootstrap over the maps; it knows nothing of the "
                "spread between seeds, and of few maps it is a rough one.",
            ),
        ],
    )


def at_start(run) -> float | None:
    """Perplexity of an adapter's run before its first step."""
    first = run.history[0] if run.history else {}
    return first.get("val/ppl") if first.get("step") == 0 and is_finite(first.get("val/ppl")) else None


def rho_words(points: list[tuple[float, float]]) -> str:
    """'0.86 (95% 0.52 to 0.97), 12 maps'"""
    x, y = zip(*points)
    if math.isnan(spearman(x, y)):
        return f"undefined, of {len(points)} maps all end alike"
    bounds = spearman_interval(x, y)
    return f"{spearman(x, y):.2f} ({f'95% {bounds[0]:.2f} to {bounds[1]:.2f}' if bounds else 'too few for an interval'}), {len(points)} maps"


# ---- curves of adapters ---------------------------------------------------------------------------------------------


def curves_part(configs: list[Configuration]):
    curves = {
        c.name: (c, points) for c in configs if c.settings.get("adapter") and len(points := mean_steps(c)) > 1
    }
    if not curves:
        return None
    chosen = sorted(curves, key=lambda name: curves[name][1][-1][1])
    if len(chosen) > CURVES:  # from the best to the worst
        chosen = [chosen[round(i * (len(chosen) - 1) / (CURVES - 1))] for i in range(CURVES)]
    parts = [name.split(", ") for name in curves]
    common = {part for part in sum(parts, []) if sum(part in other for other in parts) > len(parts) / 2}
    short = {
        name: ", ".join([first, *(part for part in rest if part not in common)])
        for name, (first, *rest) in zip(curves, parts)
    }
    fig = new_figure(9.5, 5 + 0.12 * len(chosen))
    spots = []
    handles = []
    panel = fig.subplots()
    for name, (_, points) in curves.items():
        if name not in chosen:
            panel.plot(*zip(*points), color="#bbbbbb", linewidth=0.7, zorder=1)
    for i, name in enumerate(chosen):
        steps, losses = zip(*curves[name][1])
        handles += panel.plot(
            steps,
            losses,
            color=COLOURS[i % len(COLOURS)],
            linestyle=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linewidth=1.5,
            label=plain(short[name].replace("layer map", "map"), 48),
        )
        spots += [
            (panel, step, loss, f"{name}\nstep {step:,}: loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
            for step, loss in zip(steps, losses)
        ]
    if len(curves) > len(chosen):
        handles += panel.plot(
            [], [], color="#bbbbbb", linewidth=0.7, label=f"{len(curves) - len(chosen)} others"
        )
    panel.set_xlabel("step")
    panel.set_ylabel("validation loss (nats/token)")
    tidy(panel)
    key_below(fig, handles, handlelength=3.2)
    return "adapted.png", (fig, spots), []


def mean_steps(config: Configuration) -> list[tuple[int, float]]:
    """[(step, loss)]: means over the finished runs, of the evaluations that all of them have."""
    runs = []
    for run in filter(finished, config.runs):
        runs.append({step: loss for step, loss in series(run.history, "step", "val/loss") if is_finite(loss)})
    common = sorted(set.intersection(*map(set, runs))) if runs else []
    return [(step, fmean(run[step] for run in runs)) for step in common]


# ---- AdaLoRA's ranks ------------------------------------------------------------------------------------------------


def ranks_part(configs: list[Configuration]):
    grids = {
        c.name: grid for c in configs if (grid := rank_grid([run for run in c.runs if finished(run)]))[0]
    }
    if not grids:
        return None
    shown = list(grids.items())[:4]
    widest = max(len(layers) for layers, _, _ in grids.values())
    heights = [0.9 + 0.36 * len(matrices) for _, (_, matrices, _) in shown]
    fig = new_figure(4.2 + 0.55 * widest, 0.6 + sum(h + 0.9 for h in heights))
    rows = []
    panels = fig.subplots(
        2 * len(shown),
        2,
        squeeze=False,
        gridspec_kw={
            "height_ratios": [r for h in heights for r in (0.9, h)],
            "width_ratios": [0.55 * widest, 1.3],
        },
    )
    for i, (name, (layers, matrices, grid)) in enumerate(shown):
        above, corner, panel, beside = *panels[2 * i], *panels[2 * i + 1]
        corner.axis("off")
        draw_rank_grid(panel, above, beside, layers, matrices, grid)
        above.set_title(plain(name, 60), fontsize=10.5, loc="left")
    for name, (layers, matrices, grid) in grids.items():
        late, mlp = rank_shares(layers, matrices, grid)
        rows.append([name, f"{100 * late:.0f}%", f"{100 * mlp:.0f}%"])
    return (
        "adalora_ranks.png",
        (fig, []),
        [
            (
                "table",
                ["configuration", "of all ranks in the later half of the layers", "in the MLP"],
                rows,
                "numbers",
            )
        ],
    )


def draw_rank_grid(panel, above, beside, layers: list[int], matrices: list[str], grid: list[list[float]]):
    """Layers across, matrices down; the sums by layer in the panel above, by matrix in the one beside."""
    image = panel.imshow(grid, cmap="cividis", aspect="auto", vmin=0)
    for y, row in enumerate(grid):
        for x, rank in enumerate(row):
            if is_finite(rank):
                panel.text(
                    x,
                    y,
                    f"{rank:g}" if rank == round(rank) else f"{rank:.1f}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if image.norm(rank) < 0.55 else "black",
                )
    panel.set(
        xticks=range(len(layers)),
        xticklabels=layers,
        yticks=range(len(matrices)),
        yticklabels=matrices,
        xlabel="layer",
    )
    panel.spines[:].set_visible(False)
    by_layer = [sum(row[x] for row in grid if is_finite(row[x])) for x in range(len(layers))]
    by_matrix = [sum(filter(is_finite, row)) for row in grid]
    bars = above.bar(range(len(layers)), by_layer, color=GREY, width=0.8)
    above.bar_label(bars, fmt="%.3g", fontsize=8.5)
    above.set(xlim=panel.get_xlim(), ylim=(0, 1.25 * max(by_layer) or 1))
    bars = beside.barh(range(len(matrices)), by_matrix, color=GREY, height=0.8)
    beside.bar_label(bars, fmt="%.3g", fontsize=8.5)
    beside.set(ylim=panel.get_ylim(), xlim=(0, 1.4 * max(by_matrix) or 1))
    for bare in (above, beside):
        bare.set(xticks=[], yticks=[])
        bare.spines[:].set_visible(False)
