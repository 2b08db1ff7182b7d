"""The tables of a sweep: every run, to sort and filter; configurations over their seeds; the frontier.

Configurations in, blocks of nanochat/report/page.py out.
"""

import math
from statistics import fmean

from nanochat.metrics import Run
from nanochat.report.comparable import status_words
from nanochat.report.configurations import (
    Configuration,
    finished,
    paste_flags,
    run_seed,
    run_value,
    step_seconds,
    varying_settings,
)
from nanochat.report.pairing import mean_logs, seed_differences
from nanochat.report.run_tables import number_text, thresholds
from nanochat.report.summaries import (
    COSTS,
    MEASURES,
    any_diverged,
    baseline,
    frontier,
    memory_key,
    outcome,
    same_machine,
    times_to_perplexity,
)
from nanochat.units import TIME, human

# A column: (summary key, label, unit ladder or number of decimals).
QUALITY = {
    "loss": [("val/ppl", "perplexity", 2), ("val/bpb", "bits per byte", 4)],
    "bpb": [("val/bpb", "bits per byte", 4)],
}


# ---- every run ---------------------------------------------------------------------------------------------


def runs_table(configs: list[Configuration], measure: str) -> tuple:
    """A row for each run; the settings that differ are the filters.

    Unfinished runs have no values: a reader would take them for final ones.
    """
    flags = [flag for flag in varying_settings(configs) if not flag.endswith("_fingerprint")]
    filters = [flag.replace("_", " ") for flag in flags]
    columns = run_columns(configs, measure)
    rows = []
    for config in configs:
        settings = [config.settings.get(flag) for flag in flags]
        for run in config.runs:
            values = [run_cell(run, key, unit) for key, _, unit in columns]
            rows.append([run.name, config.name, *settings, run_seed(run), status_words(run), *values])
    labels = [label for _, label, _ in columns]
    header = ["run", "configuration", *filters, "seed", "status", *labels]
    return ("runs", header, rows, [*filters, "seed", "status"])


def run_columns(configs: list[Configuration], measure: str) -> list[tuple]:
    """Quality, the recorded costs, and the times to the perplexities that a configuration reached."""
    runs = [run for config in configs for run in config.runs]
    columns = list(QUALITY[measure])
    for column in COSTS:
        if any(run_value(run, column[0]) is not None for run in runs):
            columns.append(column)
    if measure == "loss":
        for p in thresholds(runs):
            if any(times_to_perplexity(config, p) for config in configs):
                key = f"time_to_ppl/{p:g}/seconds_interpolated"
                columns.append((key, f"time to perplexity {p:g}", TIME))
    return columns


def run_cell(run: Run, key: str, unit) -> tuple[str, float] | None:
    """(text, number to sort by) of a finished run. The number is not finite if the run diverged."""
    if not finished(run):
        return None
    number = step_seconds(run) if key == "step_time" else run.summary.get(key)
    return (number_text(number, unit), number) if isinstance(number, (int, float)) else None


# ---- configurations over their seeds -----------------------------------------------------------------------


def configurations_table(configs: list[Configuration], measure: str) -> list[tuple]:
    """A row for each configuration: means over its finished runs, and their ratios to the baseline's."""
    y_key, y_label = MEASURES[measure]
    usable = [config for config in configs if config.values(y_key)]
    base = baseline(usable, y_key)
    keys = ["params/total"]
    if same_machine(usable):
        keys += [memory_key(usable), "step_time", "total_training_time"]
    columns = [column for column in COSTS if column[0] in keys]
    rows = []
    for config in usable:
        mark = " †" if any_diverged(config, y_key) else ""
        quality = f"{outcome(config, y_key)}{mark}{ratio_to_baseline(config, base, y_key)}"
        costs = [cost_cell(config, base, key, unit) for key, _, unit in columns]
        seeds = len(config.values(y_key))
        rows.append([config.name, seeds, (quality, config.mean(y_key)), *costs])
    labels = [label for _, label, _ in columns]
    return [
        ("subheading", "Configurations"),
        ("paragraph", table_explanation(usable, base, y_key)),
        ("runs", ["configuration", "runs", y_label, *labels], rows, []),
    ]


def cost_cell(config: Configuration, base: Configuration | None, key: str, unit) -> tuple | None:
    mean = config.mean(key)
    return None if mean is None else (human(mean, unit) + ratio_to_baseline(config, base, key), mean)


def ratio_to_baseline(config: Configuration, base: Configuration | None, key: str) -> str:
    """ " ×0.705", the geometric mean over the seeds that both have.

    The ratio of two means over different seeds would compare the seeds too.
    """
    if not base or config is base:
        return ""
    differences = seed_differences(mean_logs([config], key), mean_logs([base], key))
    return f" ×{math.exp(fmean(differences.values())):.3f}" if differences else ""


def table_explanation(configs: list[Configuration], base: Configuration | None, y_key: str) -> str:
    sentences = ["Means over seeds, ± one standard deviation (of two seeds: both values)."]
    if base:
        sentences.append(f"× is the ratio to {base.name}, over the seeds that both have.")
    if any(any_diverged(config, y_key) for config in configs):
        sentences.append("† A run diverged; the mean over the others looks better than it is.")
    if not same_machine(configs):
        sentences.append("Different machines: times and memory are not compared.")
    return " ".join(sentences)


# ---- the frontier ------------------------------------------------------------------------------------------


def frontier_table(configs: list[Configuration], measure: str) -> list[tuple]:
    """The configurations on a Pareto frontier, the best first, with the flags that make them."""
    y_key, y_label = MEASURES[measure]
    costs = [("params/total", "parameters"), ("total_training_flops", "FLOPs")]
    if same_machine(configs):
        costs += [(memory_key(configs), "memory"), ("total_training_time", "time")]
    costs_by_name = {}
    on_frontier = {}
    for x_key, label in costs:
        for config in frontier(configs, x_key, y_key):
            on_frontier[config.name] = config
            costs_by_name.setdefault(config.name, []).append(label)
    if not on_frontier:
        return []
    rows = []
    for config in sorted(on_frontier.values(), key=lambda config: config.mean(y_key)):
        labels = ", ".join(costs_by_name[config.name])
        rows.append([config.name, labels, outcome(config, y_key), paste_flags(config)])
    explanation = (
        "No other configuration reaches as low a mean at as little of that cost. A difference that is small "
        "beside the spread over seeds can decide who is listed here. Paste the flags behind python -m "
        "scripts.base_train."
    )
    return [
        ("subheading", "On a frontier"),
        ("paragraph", explanation),
        ("table", ["configuration", "frontier of", y_label, "flags"], rows, "text"),
    ]
