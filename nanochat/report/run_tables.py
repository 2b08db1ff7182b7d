"""The tables of a few runs side by side: runs in, blocks of nanochat/report/page.py out."""

import re

from nanochat.history import series
from nanochat.metrics import Run
from nanochat.report.comparable import (
    BOTH_FINISHED,
    SAME_MACHINE,
    SAME_TEXT,
    SAME_TOKENIZER,
    config_value,
    flags,
    join_names,
    status_words,
    summary_number,
)
from nanochat.report.page import align_ratios
from nanochat.units import BYTES, COUNT, FLOP, TIME, human, is_finite, three_digits

MAX_COLUMNS = 4  # up to so many runs stand side by side as columns; more become rows

# (section, [(key in summary.json, label, unit ladder or number of decimals, what its ratio needs; None: no ratio shown)])
SECTIONS = [
    (
        "Outcome",
        [
            ("val/ppl", "validation perplexity", 2, (SAME_TEXT, SAME_TOKENIZER, BOTH_FINISHED)),
            ("val/bpb", "validation bits per byte", 4, (SAME_TEXT, BOTH_FINISHED)),
            ("val/loss", "validation loss, nats/token", 4, None),
        ],
    ),
    (
        "Parameters",
        [
            ("params/total", "total", COUNT, ()),
            ("params/attention", "attention", COUNT, ()),
            ("params/mlp", "MLP", COUNT, ()),
            ("params/embedding", "embedding", COUNT, ()),
            ("params/lm_head", "lm_head", COUNT, ()),
            ("params/other", "other", COUNT, None),
        ],
    ),
    (
        "Memory of a process",
        [
            ("mem/peak_bytes", "peak", BYTES, (SAME_MACHINE,)),
            ("mem/weights_bytes", "weights", BYTES, (SAME_MACHINE,)),
            ("mem/grads_bytes", "gradients", BYTES, (SAME_MACHINE,)),
            ("mem/optimizer_bytes", "optimizer state", BYTES, (SAME_MACHINE,)),
            ("mem/rest_bytes", "activations and other", BYTES, (SAME_MACHINE,)),
        ],
    ),
    (
        "Training",
        [
            ("total_training_time", "time", TIME, (SAME_MACHINE, BOTH_FINISHED)),
            ("mean_tok_per_sec", "tokens/s", 0, (SAME_MACHINE,)),
            ("total_tokens", "tokens", COUNT, (BOTH_FINISHED,)),
            ("flops/per_token", "FLOPs per token", FLOP, ()),
            ("total_training_flops", "FLOPs", FLOP, (BOTH_FINISHED,)),
        ],
    ),
]
THRESHOLD_ROWS = [
    ("seconds", "time", TIME, (SAME_TEXT, SAME_TOKENIZER, SAME_MACHINE)),
    ("seconds_interpolated", "time, interpolated", TIME, (SAME_TEXT, SAME_TOKENIZER, SAME_MACHINE)),
    ("tokens", "tokens", COUNT, (SAME_TEXT, SAME_TOKENIZER)),
    ("tokens_interpolated", "tokens, interpolated", COUNT, (SAME_TEXT, SAME_TOKENIZER)),
    ("flops", "FLOPs", FLOP, (SAME_TEXT, SAME_TOKENIZER)),
    ("flops_interpolated", "FLOPs, interpolated", FLOP, (SAME_TEXT, SAME_TOKENIZER)),
]


def number_text(value, form) -> str:
    """A number as text: `form` is a unit ladder or a number of decimals."""
    if value is None:
        return "–"
    if not is_finite(value):
        return f"{value:g}"  # nan or inf: a run that diverged says so
    return f"{value:,.{form}f}" if isinstance(form, int) else human(value, form)


def ratio(runs: list[Run], run: Run, key: str, needs, broken: dict) -> str:
    """ " ×0.53" against the first run, or nothing where the two may not be divided."""
    value = summary_number(run, key)
    base = summary_number(runs[0], key)
    if run is runs[0] or needs is None or any(run.name in broken[need] for need in needs):
        return ""
    if not (is_finite(value) and is_finite(base) and base > 0):
        return ""
    share = value / base
    return " ×" + (
        f"{share:.3f}" if 0.1 <= share < 10 else three_digits(share)
    )  # mostly one width: columns line up


def threshold_cell(
    runs: list[Run], run: Run, threshold: float, name: str, ladder, needs, broken: dict
) -> str:
    key = f"time_to_ppl/{threshold:g}/{name}"
    if summary_number(run, key) is not None:
        return number_text(summary_number(run, key), ladder) + ratio(runs, run, key, needs, broken)
    evaluated = [perplexity for (perplexity,) in series(run.history, "val/ppl") if is_finite(perplexity)]
    # otherwise it was reached, but the run was not asked to note when; or no estimate is possible
    return "not reached" if evaluated and min(evaluated) > threshold else "–"


def thresholds(runs: list[Run]) -> list[float]:
    """Every perplexity that any run was asked for or reached, easiest first."""
    found = {key.split("/")[1] for run in runs for key in run.summary if key.startswith("time_to_ppl/")}
    for run in runs:
        found |= set(re.findall(r"[\d.]+", str(config_value(run, "flags.ppl_thresholds") or "")))
    return sorted({float(p) for p in found if re.fullmatch(r"\d+(\.\d+)?", p)}, reverse=True)


def result_tables(runs: list[Run], broken: dict) -> list[tuple]:
    sections = []
    status = ("status", [status_words(run) for run in runs])
    for section, metrics in SECTIONS:
        rows = [] if sections else [status]
        for key, label, form, needs in metrics:
            cells = [
                number_text(summary_number(run, key), form) + ratio(runs, run, key, needs, broken)
                for run in runs
            ]
            if key == "mem/peak_bytes" and all(config_value(run, "device.type") == "cpu" for run in runs):
                label = "peak (whole process)"
            if key != "mem/rest_bytes" or any(c != "–" for c in cells):  # no such row on CPU
                rows.append((label, cells))
        sections.append((section, rows))
    for p in thresholds(runs):
        sections.append(
            (
                f"To reach perplexity {p:g}",
                [
                    (label, [threshold_cell(runs, run, p, name, ladder, needs, broken) for run in runs])
                    for name, label, ladder, needs in THRESHOLD_ROWS
                    if "interpolated" not in name
                    or any(f"time_to_ppl/{p:g}/{name}" in run.summary for run in runs)
                ],
            )
        )
    return grid(runs, sections, "numbers")


def grid(runs: list[Run], sections: list, kind: str) -> list[tuple]:
    """Few runs: one table with a column a run. Many: one table a section, with a row a run."""
    if len(runs) <= MAX_COLUMNS:
        rows = [
            row
            for section, lines in sections
            for row in ([section], *([label, *cells] for label, cells in lines))
        ]
        return [("table", ["", *(run.name for run in runs)], align_ratios(rows), kind)]
    blocks = []
    for section, lines in sections:
        rows = [[run.name, *(cells[i] for _, cells in lines)] for i, run in enumerate(runs)]
        blocks += [
            ("subheading", section),
            ("table", ["", *(label for label, _ in lines)], align_ratios(rows), kind),
        ]
    return blocks


def core_tables(runs: list[Run]) -> list[tuple]:
    """CORE and the centred accuracy of each task, with intervals; of many runs CORE alone. Nothing if no run was measured."""
    measured = [run for run in runs if run.core]
    if not measured:
        return []
    tasks = (
        list(dict.fromkeys(label for run in measured for label in run.core["tasks"]))
        if len(runs) <= MAX_COLUMNS
        else []
    )
    rows = [
        (
            "CORE",
            [
                with_interval(run.core.get("core_metric"), run.core.get("core_metric_interval"))
                for run in runs
            ],
        )
    ]
    for label in tasks:
        of_runs = [run.core["tasks"].get(label, {}) if run.core else {} for run in runs]
        rows.append((label, [with_interval(t.get("centered"), t.get("centered_interval")) for t in of_runs]))
    rows.append(
        (
            "questions",
            [
                number_text(sum(t["examples"] for t in run.core["tasks"].values()), 0) if run.core else "–"
                for run in runs
            ],
        )
    )
    rows.append(
        ("at step", [number_text(run.core["settings"]["step"], 0) if run.core else "–" for run in runs])
    )
    text_ = (
        "Accuracy on questions after a few solved examples, centred: 0 is guessing, 1 is all right; CORE is the mean over the tasks. "
        "In brackets 95% bootstrap intervals over the questions asked, which know nothing of the spread between seeds."
    )
    asked = {(run.core["settings"]["bundle"], run.core["settings"]["max_per_task"]) for run in measured}
    warning = [
        (
            "warning",
            "CORE: not the same questions were asked of all runs (another bundle, or another --max-per-task).",
        )
    ] * (len(asked) > 1)
    return [
        ("heading", "CORE"),
        *warning,
        ("paragraph", text_),
        *grid(runs, [("Centred accuracy", rows)], "numbers"),
    ]


def with_interval(value, interval) -> str:
    return "–" if value is None else f"{value:.4f} ({interval[0]:.4f} to {interval[1]:.4f})"


def ratio_summary(runs: list[Run], broken: dict) -> list[tuple]:
    """One line a run, for a few: what it costs and buys against the first."""
    lines = []
    perplexity = ("val/ppl", "validation perplexity", (SAME_TEXT, SAME_TOKENIZER, BOTH_FINISHED))
    bpb = ("val/bpb", "validation bits per byte", (SAME_TEXT, BOTH_FINISHED))
    for run in runs[1:]:
        wanted = [
            ("params/total", "parameters", ()),
            bpb if run.name in broken[SAME_TOKENIZER] else perplexity,
            ("total_training_time", "training time", (SAME_MACHINE, BOTH_FINISHED)),
            ("mem/peak_bytes", "peak memory", (SAME_MACHINE,)),
        ]
        parts = [
            f"{r.strip()} {what}"
            for key, what, needs in wanted
            if (r := ratio(runs, run, key, needs, broken))
        ]
        if parts:
            lines.append(f"**{run.name}** against {runs[0].name}: " + ", ".join(parts) + ".")
    return [("list", lines)] if lines and len(runs) <= MAX_COLUMNS else []


def setup_words(run: Run) -> dict[str, str]:
    """What a run was, in words, from its config.json."""

    def get(path):
        return text(config_value(run, path))

    def model(key):
        return get(f"derived.model.{key}")

    return {
        "model": f"{model('n_layer')} layers × {model('n_embd')} wide, {model('n_head')} heads, MLP × {config_value(run, 'derived.model.mlp_ratio') or 4:g}, "
        f"vocabulary {model('vocab_size')}",
        "attention rank": describe_ranks(config_value(run, "derived.model.attn_ranks")),
        "MLP rank": describe_ranks(config_value(run, "derived.model.mlp_ranks")),
        "lm_head rank": describe_ranks([config_value(run, "derived.model.lm_head_rank")]),
        "corpus": get("derived.corpus.name"),
        "tokens": number_text(config_value(run, "derived.tokens"), COUNT),
        "batch": f"{get('derived.total_batch_size')} tokens × {get('derived.num_iterations')} steps",
        "schedule": f"warmup {get('flags.warmup_steps')} steps, warmdown over the last {get('flags.warmdown_ratio')} of the run "
        f"to {get('flags.final_lr_frac')} of the peak",
        "device": f"{get('device.name')}, processes: {get('device.processes')}, threads: {get('device.threads')}",
        "dtype": get("device.dtype"),
        "seed": get("seed"),
        "commit": get("git.commit")[:10] + (" (dirty)" if config_value(run, "git.dirty") else ""),
        "python, torch": f"{get('versions.python')}, {get('versions.torch')}",
    }


def setup_tables(runs: list[Run]) -> list[tuple]:
    set_ups = [setup_words(run) for run in runs]
    rows = [(label, [each[label] for each in set_ups]) for label in set_ups[0]]
    keys = list(dict.fromkeys(key for run in runs for key in flags(run)))
    given = [("--" + key.replace("_", "-"), [text(flags(run).get(key)) for run in runs]) for key in keys]
    differing = [(flag, values) for flag, values in given if len(set(values)) > 1]
    shared = [f"{flag} {values[0]}" for flag, values in given if len(set(values)) == 1]
    blocks = []
    if len(runs) > MAX_COLUMNS:  # what all share would be a column of repetitions
        blocks = [
            (
                "list",
                [f"**{label}** of all runs: {cells[0]}" for label, cells in rows if len(set(cells)) == 1],
            )
        ]
        rows = [(label, cells) for label, cells in rows if len(set(cells)) > 1]
    blocks += grid(
        runs,
        [section for section in (("Set-up", rows), ("Flags that differ", differing)) if section[1]],
        "text",
    )
    return blocks + (
        [("details", f"Flags all runs share ({len(shared)})", "\n".join(shared))] if shared else []
    )


def text(value) -> str:
    return "–" if value is None else str(value)


def describe_ranks(ranks) -> str:
    """One rank if all layers share it; 0, or none, is full rank."""
    if not isinstance(ranks, list) or None in ranks:
        return "–"
    words = ["full" if r == 0 else str(r) for r in ranks or [0]]
    return words[0] if len(set(words)) == 1 else ", ".join(words)


def sample_tables(runs: list[Run]) -> list[tuple]:
    """The last texts each run wrote, side by side."""
    last = [last_sample(run) for run in runs]
    rows = max((len(h.get("sample", ())) for h in last), default=0)
    if not rows:
        return []
    lines = [
        (f"sample {i + 1}", [clean(h["sample"][i]) if i < len(h.get("sample", ())) else "–" for h in last])
        for i in range(rows)
    ]
    steps = join_names([f"{run.name} at step {h.get('step')}" for run, h in zip(runs, last) if h])
    return [
        ("heading", "Samples"),
        ("paragraph", f"Written by {steps}."),
        *grid(runs, [("Continuations", lines)], "samples"),
    ]


def last_sample(run: Run) -> dict:
    """The step and the texts of the newest sample; {} if there is none."""
    newest = {}
    for step, texts in series(run.history, "step", "sample"):
        newest = {"step": step, "sample": texts}
    return newest


def clean(sample) -> str:
    """A sample as a document can hold it: control characters visible, of bounded length."""
    sample = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(sample).strip())
    return sample if len(sample) <= 600 else sample[:600] + " …"
