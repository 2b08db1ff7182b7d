"""The tables of a few runs: results, CORE, set-up, samples. Runs in, blocks of nanochat/report/page.py out.

Up to MAX_COLUMNS runs stand side by side as columns; more become rows. A ratio to the first run is shown
where check_comparable found the conditions that it needs.
"""

import re
from typing import NamedTuple

from nanochat.history import series
from nanochat.metrics import Run
from nanochat.report.comparable import (
    BOTH_FINISHED,
    SAME_MACHINE,
    SAME_TEXT,
    SAME_TOKENIZER,
    config_value,
    join_names,
    shaping_flags,
    status_words,
    summary_number,
)
from nanochat.report.page import align_ratios
from nanochat.units import BYTES, COUNT, FLOP, TIME, human, is_finite, three_digits

MAX_COLUMNS = 4
MAX_SAMPLE = 600  # characters


class Metric(NamedTuple):
    """A row of the result table."""

    key: str  # in summary.json; for a threshold: the part behind time_to_ppl/P/
    label: str
    unit: list | int  # a ladder of units, or a number of decimals
    needs: tuple | None  # conditions of a ratio to the first run; None: no ratio is shown


SECTIONS = [
    (
        "Outcome",
        [
            Metric("val/ppl", "validation perplexity", 2, (SAME_TEXT, SAME_TOKENIZER, BOTH_FINISHED)),
            Metric("val/bpb", "validation bits per byte", 4, (SAME_TEXT, BOTH_FINISHED)),
            Metric("val/loss", "validation loss, nats/token", 4, None),
        ],
    ),
    (
        "Parameters",
        [
            Metric("params/total", "total", COUNT, ()),
            Metric("params/attention", "attention", COUNT, ()),
            Metric("params/mlp", "MLP", COUNT, ()),
            Metric("params/embedding", "embedding", COUNT, ()),
            Metric("params/lm_head", "lm_head", COUNT, ()),
            Metric("params/other", "other", COUNT, None),
        ],
    ),
    (
        "Memory of a process",
        [
            Metric("mem/peak_bytes", "peak", BYTES, (SAME_MACHINE,)),
            Metric("mem/weights_bytes", "weights", BYTES, (SAME_MACHINE,)),
            Metric("mem/grads_bytes", "gradients", BYTES, (SAME_MACHINE,)),
            Metric("mem/optimizer_bytes", "optimizer state", BYTES, (SAME_MACHINE,)),
            Metric("mem/rest_bytes", "activations and other", BYTES, (SAME_MACHINE,)),
        ],
    ),
    (
        "Training",
        [
            Metric("total_training_time", "time", TIME, (SAME_MACHINE, BOTH_FINISHED)),
            Metric("mean_tok_per_sec", "tokens/s", 0, (SAME_MACHINE,)),
            Metric("total_tokens", "tokens", COUNT, (BOTH_FINISHED,)),
            Metric("flops/per_token", "FLOPs per token", FLOP, ()),
            Metric("total_training_flops", "FLOPs", FLOP, (BOTH_FINISHED,)),
        ],
    ),
]
THRESHOLD_METRICS = [
    Metric("seconds", "time", TIME, (SAME_TEXT, SAME_TOKENIZER, SAME_MACHINE)),
    Metric("seconds_interpolated", "time, interpolated", TIME, (SAME_TEXT, SAME_TOKENIZER, SAME_MACHINE)),
    Metric("tokens", "tokens", COUNT, (SAME_TEXT, SAME_TOKENIZER)),
    Metric("tokens_interpolated", "tokens, interpolated", COUNT, (SAME_TEXT, SAME_TOKENIZER)),
    Metric("flops", "FLOPs", FLOP, (SAME_TEXT, SAME_TOKENIZER)),
    Metric("flops_interpolated", "FLOPs, interpolated", FLOP, (SAME_TEXT, SAME_TOKENIZER)),
]


# ---- cells -------------------------------------------------------------------------------------------------


def number_text(value, unit) -> str:
    """A number in a unit: a ladder of units, or a number of decimals."""
    if value is None:
        return "–"
    if not is_finite(value):
        return f"{value:g}"  # nan or inf: the run diverged
    return f"{value:,.{unit}f}" if isinstance(unit, int) else human(value, unit)


def ratio(run: Run, first: Run, key: str, needs: tuple | None, broken: dict) -> str:
    """ " ×0.53", the run's value over that of the first; "" if a condition that the ratio needs is broken."""
    value = summary_number(run, key)
    base = summary_number(first, key)
    if run is first or needs is None or any(run.name in broken[need] for need in needs):
        return ""
    if not (is_finite(value) and is_finite(base) and base > 0):
        return ""
    share = value / base
    # the usual ratios get the same number of decimals, so that they line up in a column
    return f" ×{share:.3f}" if 0.1 <= share < 10 else f" ×{three_digits(share)}"


def metric_cell(run: Run, first: Run, metric: Metric, broken: dict) -> str:
    value = summary_number(run, metric.key)
    return number_text(value, metric.unit) + ratio(run, first, metric.key, metric.needs, broken)


def threshold_cell(run: Run, first: Run, threshold: float, metric: Metric, broken: dict) -> str:
    """When the run reached the perplexity. "–": it has no record of when, or no evaluation."""
    metric = metric._replace(key=f"time_to_ppl/{threshold:g}/{metric.key}")
    if summary_number(run, metric.key) is not None:
        return metric_cell(run, first, metric, broken)
    evaluated = [perplexity for (perplexity,) in series(run.history, "val/ppl") if is_finite(perplexity)]
    return "not reached" if evaluated and min(evaluated) > threshold else "–"


# ---- results -----------------------------------------------------------------------------------------------


def result_tables(runs: list[Run], broken: dict) -> list[tuple]:
    sections = [(section, metric_rows(runs, metrics, broken)) for section, metrics in SECTIONS]
    outcome_rows = sections[0][1]
    outcome_rows.insert(0, ("status", [status_words(run) for run in runs]))
    for threshold in thresholds(runs):
        rows = threshold_rows(runs, threshold, broken)
        sections.append((f"To reach perplexity {threshold:g}", rows))
    return grid(runs, sections, "numbers")


def metric_rows(runs: list[Run], metrics: list[Metric], broken: dict) -> list[tuple]:
    """(label, cells by run) for each metric."""
    on_cpu = all(config_value(run, "device.type") == "cpu" for run in runs)
    rows = []
    for metric in metrics:
        cells = [metric_cell(run, runs[0], metric, broken) for run in runs]
        if metric.key == "mem/rest_bytes" and all(cell == "–" for cell in cells):
            continue  # only a GPU's peak can be split into its parts
        whole_process = on_cpu and metric.key == "mem/peak_bytes"
        rows.append(("peak (whole process)" if whole_process else metric.label, cells))
    return rows


def threshold_rows(runs: list[Run], threshold: float, broken: dict) -> list[tuple]:
    rows = []
    for metric in THRESHOLD_METRICS:
        recorded = any(f"time_to_ppl/{threshold:g}/{metric.key}" in run.summary for run in runs)
        if recorded or "interpolated" not in metric.key:
            cells = [threshold_cell(run, runs[0], threshold, metric, broken) for run in runs]
            rows.append((metric.label, cells))
    return rows


def thresholds(runs: list[Run]) -> list[float]:
    """Every perplexity that a run was asked for or reached, easiest first."""
    texts = set()
    for run in runs:
        texts |= {key.split("/")[1] for key in run.summary if key.startswith("time_to_ppl/")}
        texts |= set(re.findall(r"[\d.]+", str(config_value(run, "flags.ppl_thresholds") or "")))
    return sorted({float(text) for text in texts if re.fullmatch(r"\d+(\.\d+)?", text)}, reverse=True)


def grid(runs: list[Run], sections: list[tuple], kind: str) -> list[tuple]:
    """Few runs: one table, a column for each run. Many: a table for each section, a row for each run.

    sections: (title, [(label, cells by run)]).
    """
    if len(runs) <= MAX_COLUMNS:
        table = []
        for title, rows in sections:
            table.append([title])
            table += [[label, *cells] for label, cells in rows]
        return [("table", ["", *(run.name for run in runs)], align_ratios(table), kind)]
    blocks = []
    for title, rows in sections:
        labels = [label for label, _ in rows]
        table = [[run.name] for run in runs]
        for _, cells in rows:
            for line, cell in zip(table, cells):
                line.append(cell)
        blocks += [("subheading", title), ("table", ["", *labels], align_ratios(table), kind)]
    return blocks


def ratio_summary(runs: list[Run], broken: dict) -> list[tuple]:
    """A line for each of a few runs: the ratios of its cost and quality to those of the first run."""
    if len(runs) > MAX_COLUMNS:
        return []
    lines = []
    for run in runs[1:]:
        quality = ("val/ppl", "validation perplexity", (SAME_TEXT, SAME_TOKENIZER, BOTH_FINISHED))
        if run.name in broken[SAME_TOKENIZER]:
            quality = ("val/bpb", "validation bits per byte", (SAME_TEXT, BOTH_FINISHED))
        parts = []
        for key, label, needs in (
            ("params/total", "parameters", ()),
            quality,
            ("total_training_time", "training time", (SAME_MACHINE, BOTH_FINISHED)),
            ("mem/peak_bytes", "peak memory", (SAME_MACHINE,)),
        ):
            if share := ratio(run, runs[0], key, needs, broken):
                parts.append(f"{share.strip()} {label}")
        if parts:
            lines.append(f"**{run.name}** against {runs[0].name}: {', '.join(parts)}.")
    return [("list", lines)] if lines else []


# ---- CORE --------------------------------------------------------------------------------------------------


def core_tables(runs: list[Run]) -> list[tuple]:
    """CORE with its interval, and for a few runs also each task. Nothing if CORE was measured for no run."""
    measured = [run for run in runs if run.core]
    if not measured:
        return []
    blocks = [("heading", "CORE")]
    settings = {(run.core["settings"]["bundle"], run.core["settings"]["max_per_task"]) for run in measured}
    if len(settings) > 1:
        warning = "the runs did not all get the same questions (another bundle, or another --max-per-task)"
        blocks.append(("warning", f"CORE: {warning}."))
    explanation = (
        "Accuracy on questions after a few solved examples, centred: 0 is guessing, 1 is all right. CORE is "
        "the mean over the tasks. In brackets: 95% bootstrap intervals over the questions, which do not "
        "include the spread between seeds."
    )
    tables = grid(runs, [("Centred accuracy", core_rows(runs, measured))], "numbers")
    return [*blocks, ("paragraph", explanation), *tables]


def core_rows(runs: list[Run], measured: list[Run]) -> list[tuple]:
    core = [interval_text(run.core, "core_metric") for run in runs]
    rows = [("CORE", core)]
    if len(runs) <= MAX_COLUMNS:
        labels = [label for run in measured for label in run.core["tasks"]]
        for label in dict.fromkeys(labels):
            tasks = [run.core.get("tasks", {}).get(label, {}) for run in runs]
            rows.append((label, [interval_text(task, "centered") for task in tasks]))
    questions = []
    steps = []
    for run in runs:
        tasks = run.core.get("tasks", {}).values()
        count = sum(task["examples"] for task in tasks) if run.core else None
        step = run.core["settings"]["step"] if run.core else None
        questions.append(number_text(count, 0))
        steps.append(number_text(step, 0))
    return [*rows, ("questions", questions), ("at step", steps)]


def interval_text(results: dict, key: str) -> str:
    """ "0.1234 (0.1000 to 0.1500)"; "–" if the key is missing."""
    value = results.get(key)
    if value is None:
        return "–"
    low, high = results[f"{key}_interval"]
    return f"{value:.4f} ({low:.4f} to {high:.4f})"


# ---- the set-up --------------------------------------------------------------------------------------------


def setup_tables(runs: list[Run]) -> list[tuple]:
    """Model, data, schedule and machine of each run, and the flags that differ."""
    setups = [setup_words(run) for run in runs]
    rows = []
    for label in setups[0]:
        rows.append((label, [setup[label] for setup in setups]))
    blocks = []
    if len(runs) > MAX_COLUMNS:  # values that all runs share would fill a column with repetitions
        shared = [f"**{label}** of all runs: {cells[0]}" for label, cells in rows if len(set(cells)) == 1]
        blocks = [("list", shared)]
        rows = [(label, cells) for label, cells in rows if len(set(cells)) > 1]
    differing, shared_flags = compare_flags(runs)
    sections = [("Set-up", rows), ("Flags that differ", differing)]
    blocks += grid(runs, [section for section in sections if section[1]], "text")
    if shared_flags:
        title = f"Flags all runs share ({len(shared_flags)})"
        blocks.append(("details", title, "\n".join(shared_flags)))
    return blocks


def setup_words(run: Run) -> dict[str, str]:
    """{label: text} on model, data, schedule and machine, from config.json."""

    def words(path: str) -> str:
        return text(config_value(run, path))

    layers = words("derived.model.n_layer")
    width = words("derived.model.n_embd")
    ratio = config_value(run, "derived.model.mlp_ratio") or 4
    commit = words("git.commit")[:10]
    return {
        "model": f"{layers} layers × {width} wide, {words('derived.model.n_head')} heads, MLP × {ratio:g}, "
        f"vocabulary {words('derived.model.vocab_size')}",
        "attention rank": describe_ranks(config_value(run, "derived.model.attn_ranks")),
        "MLP rank": describe_ranks(config_value(run, "derived.model.mlp_ranks")),
        "lm_head rank": describe_ranks([config_value(run, "derived.model.lm_head_rank")]),
        "corpus": words("derived.corpus.name"),
        "tokens": number_text(config_value(run, "derived.tokens"), COUNT),
        "batch": f"{words('derived.total_batch_size')} tokens × {words('derived.num_iterations')} steps",
        "schedule": f"warmup {words('flags.warmup_steps')} steps, warmdown over the last "
        f"{words('flags.warmdown_ratio')} of the run to {words('flags.final_lr_frac')} of the peak",
        "device": f"{words('device.name')}, processes: {words('device.processes')}, "
        f"threads: {words('device.threads')}",
        "dtype": words("device.dtype"),
        "seed": words("seed"),
        "commit": f"{commit} (dirty)" if config_value(run, "git.dirty") else commit,
        "python, torch": f"{words('versions.python')}, {words('versions.torch')}",
    }


def compare_flags(runs: list[Run]) -> tuple[list[tuple], list[str]]:
    """([(flag, values by run)] of the flags that differ, ["--flag value", ...] of those that all share)."""
    flags = [shaping_flags(run) for run in runs]
    differing = []
    shared = []
    for key in dict.fromkeys(key for each in flags for key in each):
        name = "--" + key.replace("_", "-")
        values = [text(each.get(key)) for each in flags]
        if len(set(values)) > 1:
            differing.append((name, values))
        else:
            shared.append(f"{name} {values[0]}")
    return differing, shared


def text(value) -> str:
    return "–" if value is None else str(value)


def describe_ranks(ranks) -> str:
    """One rank if all layers share it; "full" for a rank of 0, and for no ranks at all."""
    if not isinstance(ranks, list) or None in ranks:
        return "–"
    words = ["full" if rank == 0 else str(rank) for rank in ranks or [0]]
    return words[0] if len(set(words)) == 1 else ", ".join(words)


# ---- samples -----------------------------------------------------------------------------------------------


def sample_tables(runs: list[Run]) -> list[tuple]:
    """The last texts that each run wrote, side by side."""
    newest = [newest_samples(run) for run in runs]
    count = max((len(texts) for _, texts in newest), default=0)
    if not count:
        return []
    rows = []
    for i in range(count):
        cells = [printable_sample(texts[i]) if i < len(texts) else "–" for _, texts in newest]
        rows.append((f"sample {i + 1}", cells))
    steps = [f"{run.name} at step {step}" for run, (step, _) in zip(runs, newest) if step is not None]
    return [
        ("heading", "Samples"),
        ("paragraph", f"Written by {join_names(steps)}."),
        *grid(runs, [("Continuations", rows)], "samples"),
    ]


def newest_samples(run: Run) -> tuple[int | None, list[str]]:
    """(step, texts) of the newest samples; (None, []) if there are none."""
    samples = list(series(run.history, "step", "sample"))
    return samples[-1] if samples else (None, [])


def printable_sample(sample) -> str:
    """A sample as a document can hold it: control characters replaced, of bounded length."""
    sample = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(sample).strip())
    return sample if len(sample) <= MAX_SAMPLE else f"{sample[:MAX_SAMPLE]} …"
