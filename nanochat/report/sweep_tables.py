"""The tables of a study, as blocks of nanochat/report/page.py: every run, to sort and filter; configurations over their seeds; the frontier."""

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

QUALITY = {
    "loss": [("val/ppl", "perplexity", 2), ("val/bpb", "bits per byte", 4)],
    "bpb": [("val/bpb", "bits per byte", 4)],
}


def runs_table(configs: list[Configuration], measure: str) -> tuple:
    """A row a run, its axes as filters. What is unfinished has no values: they would be read as final."""
    varying = [axis for axis in varying_settings(configs) if not axis.endswith("_fingerprint")]
    runs = [run for c in configs for run in c.runs]
    columns = QUALITY[measure] + [
        column for column in COSTS if any(run_value(run, column[0]) is not None for run in runs)
    ]
    asked = (
        [p for p in thresholds(runs) if any(times_to_perplexity(c, p) for c in configs)]
        if measure == "loss"
        else []
    )
    columns += [(f"time_to_ppl/{p:g}/seconds_interpolated", f"time to perplexity {p:g}", TIME) for p in asked]
    labels = [axis.replace("_", " ") for axis in varying]
    rows = []
    for c in configs:
        for run in c.runs:
            ours = [cell(number_of(run, key_), form) if finished(run) else None for key_, _, form in columns]
            of_run = [run_seed(run), status_words(run)]
            rows.append([run.name, c.name, *(c.settings.get(axis) for axis in varying), *of_run, *ours])
    return (
        "runs",
        ["run", "configuration", *labels, "seed", "status", *(label for _, label, _ in columns)],
        rows,
        [*labels, "seed", "status"],
    )


def number_of(run: Run, key_: str):
    """A number of the run, not finite where it diverged."""
    return step_seconds(run) if key_ == "step_time" else run.summary.get(key_)


def cell(number, form):
    return (number_text(number, form), number) if isinstance(number, (int, float)) else None


def configurations_table(configs: list[Configuration], measure: str) -> list[tuple]:
    """A row a configuration: means over its finished runs, and their ratio to the baseline's."""
    y_key, y_words = MEASURES[measure]
    done = [c for c in configs if c.values(y_key)]
    base = baseline(done, y_key)
    alike = same_machine(done)
    wanted = ["params/total"] + [memory_key(done), "step_time", "total_training_time"] * alike
    columns = [column for column in COSTS if column[0] in wanted]
    rows = []
    for c in done:
        cells = [(outcome(c, y_key) + " †" * any_diverged(c, y_key) + against(c, base, y_key), c.mean(y_key))]
        cells += [
            (human(mean, form) + against(c, base, key_), mean) if (mean := c.mean(key_)) is not None else None
            for key_, _, form in columns
        ]
        rows.append([c.name, len(c.values(y_key)), *cells])
    words = "Means over seeds, ± one standard deviation (of two seeds: from one to the other)."
    words += f" × is the ratio to {base.name}, over the seeds that both have." if base else ""
    words += (
        " † A run diverged; the mean is over the others, which flatters."
        if any(any_diverged(c, y_key) for c in done)
        else ""
    )
    words += "" if alike else " Different machines: times and memory are not compared."
    return [
        ("subheading", "Configurations"),
        ("paragraph", words),
        ("runs", ["configuration", "runs", y_words, *(label for _, label, _ in columns)], rows, []),
    ]


def against(config: Configuration, base: Configuration | None, key_: str) -> str:
    """ " ×0.705", the geometric mean over the seeds that both have: a mean over other seeds would compare seeds too."""
    shared = (
        list(seed_differences(mean_logs([config], key_), mean_logs([base], key_)).values())
        if base and config is not base
        else []
    )
    return f" ×{math.exp(fmean(shared)):.3f}" if shared else ""


def frontier_table(configs: list[Configuration], measure: str) -> list[tuple]:
    """The configurations on a Pareto frontier, with what makes them."""
    y_key, y_words = MEASURES[measure]
    costs = [("params/total", "parameters"), ("total_training_flops", "FLOPs")]
    costs += (
        [(memory_key(configs), "memory"), ("total_training_time", "time")] if same_machine(configs) else []
    )
    on = {}
    for x_key, words in costs:
        for c in frontier(configs, x_key, y_key):
            on.setdefault(c.name, (c, []))[1].append(words)
    rows = [
        [c.name, ", ".join(words), outcome(c, y_key), paste_flags(c)]
        for c, words in sorted(on.values(), key=lambda found: found[0].mean(y_key))
    ]
    return (
        [
            ("subheading", "On a frontier"),
            (
                "paragraph",
                "No other configuration's mean is as low at as little of that cost; a difference within the spread over seeds can put "
                "one here or not. The flags are to be pasted behind python -m scripts.base_train.",
            ),
            ("table", ["configuration", "frontier of", y_words, "flags"], rows, "text"),
        ]
        if rows
        else []
    )
