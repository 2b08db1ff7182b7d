"""Compare finished or running runs, from their folders (or W&B) alone: report.md, report.html, report.csv and the figures.

    python -m scripts.report full lowrank --out report/
    python -m scripts.report full_* low_* --out report/     more than a few configurations, or repeated seeds: a study, with a verdict

Run it where the tags are folders (cd runs), or give paths, for the shell to fill in the *.
"""

import dataclasses
import os
import sys
from pathlib import Path

from nanochat import common
from nanochat.common import ArgumentParser, InputError, quoted, run_script
from nanochat.eval_results import newest_core
from nanochat.files import check_out, write_atomic
from nanochat.metrics import Run, load_run, runs_dir
from nanochat.naming import no_such_run
from nanochat.report.adapter_figures import method_section
from nanochat.report.comparable import (
    SAME_TEXT,
    SAME_TOKENIZER,
    check_comparable,
    config_value,
    divergence_notes,
    join_names,
    summary_number,
)
from nanochat.report.configurations import Configuration, configurations, finished
from nanochat.report.csv_export import pair_keys, to_csv
from nanochat.report.equal_cost import equal_cost_table
from nanochat.report.page import encode, in_markdown, to_markdown, to_page
from nanochat.report.run_check import checked_run
from nanochat.report.run_figures import draw_all
from nanochat.report.run_tables import (
    MAX_COLUMNS,
    core_tables,
    ratio_summary,
    result_tables,
    sample_tables,
    setup_tables,
)
from nanochat.report.summaries import MEASURES, baseline
from nanochat.report.sweep_figures import caption, study_figures
from nanochat.report.sweep_tables import configurations_table, frontier_table, runs_table
from nanochat.report.verdict import verdict
from nanochat.report.verdict_page import verdict_blocks

FIGURES = [
    (
        "loss.png",
        "Loss against tokens, training time and compute. The first fifth of each run, where loss falls from "
        "ln(vocabulary), may leave the frame at the top.",
    ),
    ("parameters.png", "Parameters by group."),
    (
        "memory.png",
        "Memory by part. The diamond is the measured peak: on CUDA what torch allocated; on CPU the whole "
        "process, Python and libraries included.",
    ),
    ("perplexity.png", "Final quality against model size: down and to the left is better."),
]

DEFINITIONS = [
    ("×0.53", "the value divided by the first run's. Shown only where the two may be divided."),
    (
        "validation loss",
        "mean negative log likelihood in nats per token on fixed validation rows. Lower is better.",
    ),
    (
        "perplexity (ppl)",
        "exp(validation loss). It depends on the tokenizer: comparable only under the same one.",
    ),
    (
        "bits per byte (bpb)",
        "the same loss in bits, per byte of the text instead of per token: comparable across "
        "tokenizers on the same validation text.",
    ),
    (
        "parameters",
        "scalars of the model, embeddings included. A matrix of rank r counts its two factors, r × (in + out).",
    ),
    (
        "FLOPs",
        "counted from what is executed: 6 FLOPs per matrix parameter and token executed, factors included, "
        "plus attention.",
    ),
    ("time", "training steps only: the clock excludes evaluation, checkpointing and compilation."),
    ("tokens/s", "training tokens per second of that clock, over the whole run and all processes."),
    (
        "time, tokens, FLOPs to perplexity P",
        "at the first evaluation at or below P. Interpolated: an estimate between "
        "the two evaluations around P, linear in log perplexity, which depends less on how often the run was evaluated.",
    ),
    (
        "peak memory",
        "of one process. CUDA: the most bytes torch had allocated; what weights, gradients and optimizer "
        "state leave of it is “activations and other”. CPU: the peak resident set of the whole process.",
    ),
]


def main(argv=None):
    args = parse(argv)
    margins = {
        "margin_time": args.margin_time,
        "margin_memory": args.margin_memory,
        "margin_ppl": args.margin_ppl,
        "confidence": args.confidence,
        "equal_params": args.equal_params,
    }
    verdict([], **margins)  # refuses a margin that is out of range
    check_out("--out", args.out)

    runs = load_runs(args.runs, args.from_wandb)
    configs = configurations(runs)
    is_study = len(configs) > MAX_COLUMNS or any(len(c.runs) > 1 for c in configs)
    title, blocks, figures, said = (study if is_study else few)(runs, configs, margins)
    blocks += [
        ("heading", "How to read this"),
        ("list", [f"**{term}**: {meaning}" for term, meaning in DEFINITIONS]),
    ]

    sys.stdout.reconfigure(errors="replace")  # a terminal without "×" must not cost the user the table
    print(to_markdown(said), flush=True)  # before anything is written: it is shown also where that fails
    for name, figure in figures.items():
        write_atomic(args.out / name, figure[0] if isinstance(figure, tuple) else figure)
    write_atomic(
        args.out / "report.csv",
        encode(to_csv(runs, {run.name: c.name for c in configs for run in c.runs}, pair_keys(configs))),
    )
    write_atomic(args.out / "report.md", encode(f"# {in_markdown(title)}\n\n" + to_markdown(blocks)))
    write_atomic(args.out / "report.html", encode(to_page(title, blocks, figures)))
    print(f"report: {args.out / 'report.html'}")


def parse(argv):
    parser = ArgumentParser(
        "Compare runs: tables, figures, a verdict and one self-contained page, from the run folders alone."
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        metavar="RUN",
        help="run tag, or path to a run folder; of a few runs, ratios are to the first",
    )
    add(
        "--from-wandb",
        default="",
        metavar="ENTITY/PROJECT[/GROUP]",
        help="runs that are on W&B, instead of folders or beside them",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the report (created if needed)")
    add(
        "--margin-time",
        type=common.number(),
        default=0.0,
        help="H1: the share by which time per step must be below full rank's",
    )
    add(
        "--margin-memory",
        type=common.number(),
        default=0.0,
        help="H1: the share by which memory must be below full rank's",
    )
    add(
        "--margin-ppl",
        type=common.number(),
        default=0.05,
        help="H2: the share of perplexity that counts as little",
    )
    add(
        "--equal-params",
        type=common.number(),
        default=0.02,
        help="H3: the share by which equal numbers of parameters may differ",
    )
    add("--confidence", type=common.number(), default=0.95, help="of all intervals of a hypothesis together")
    args = parser.parse_args(argv)
    if not args.runs and not args.from_wandb:
        raise InputError("give RUN (tags or run folders), or --from-wandb ENTITY/PROJECT[/GROUP]")
    return args


# ---- the two reports: (title, blocks of the page, figures, blocks for the terminal) ---------------------------------


def few(runs: list[Run], configs: list[Configuration], margins: dict):
    """Some runs side by side."""
    broken, warnings, notes = check_comparable(runs)
    notes += divergence_notes(runs)
    tables = result_tables(runs, broken)
    both = {c.low_rank for c in configs if not c.method} == {True, False}
    measure = "bpb" if broken[SAME_TEXT] or broken[SAME_TOKENIZER] else "loss"
    section, more = method_section(configs, measure)
    blocks = [
        ("heading", "Results"),
        *(("warning", w) for w in warnings),
        *ratio_summary(runs, broken),
        *tables,
        *([("list", notes)] if notes else []),
        *core_tables(runs),
        *(judge(configs, margins) if both else []),
        ("heading", "Figures"),
        *(("figure", name, caption_) for name, caption_ in FIGURES),
        *section,
        ("heading", "What was compared"),
        *setup_tables(runs),
        *sample_tables(runs),
    ]
    figures = draw_all(runs, measure) | more
    return (
        "Training report: " + join_names([run.name for run in runs]),
        blocks,
        figures,
        [*(("warning", w) for w in warnings), *tables],
    )


def study(runs: list[Run], configs: list[Configuration], margins: dict):
    """Many runs, by configuration: the verdict first."""
    done = [run for run in runs if finished(run)]
    if not done:
        raise InputError(
            f"none of the {len(runs)} runs is finished: {join_names([run.name for run in runs])}; finish them, or report a few at a time"
        )
    broken, warnings, notes = check_comparable(done)
    if broken[SAME_TEXT]:
        raise InputError(
            f"{join_names(broken[SAME_TEXT])}: not evaluated, on record, on the validation text of {done[0].name}, so neither perplexity nor "
            "bits per byte compares; report each text by itself"
        )
    measure = "bpb" if broken[SAME_TOKENIZER] else "loss"
    notes = [
        note for note in notes if not note.startswith("Different seed")
    ]  # seeds are what a study repeats
    notes += divergence_notes(runs)
    if len(done) < len(runs):
        notes.append(
            f"Unfinished, and left out of the verdict, the means and the figures: {join_names([run.name for run in runs if run not in done])}."
        )
    if wild := [c.name for c in configs if any(map(finished, c.runs)) and not c.values(MEASURES[measure][0])]:
        notes.append(f"Diverged on every seed, so without a mean: {join_names(wild)}.")
    ordinary = not any(c.method for c in configs) or any(
        c.low_rank for c in configs
    )  # else there is no low rank to judge, and nobody asked
    conclusions = judge(configs, margins) if ordinary else []
    scratch = [
        c for c in configs if not c.settings.get("adapter")
    ] or configs  # what an adapter costs leaves out the model that it starts from
    means = configurations_table(configs, measure) + equal_cost_table(scratch)
    front = frontier_table(scratch, measure)
    figures = study_figures(scratch, measure)
    section, more = method_section(configs, measure)
    one_each = [dataclasses.replace(c.runs[0], name=c.name) for c in configs]
    blocks = [
        *(("warning", w) for w in warnings),
        *conclusions,
        ("heading", "Figures"),
        *(("figure", name, caption(name, scratch)) for name in figures),
        *section,
        ("heading", "Results"),
        *means,
        ("subheading", "Runs"),
        runs_table(configs, measure),
        *front,
        *([("list", notes)] if notes else []),
        *core_tables(done),
        ("heading", "What was compared"),
        ("paragraph", "One run of each configuration."),
        *setup_tables(one_each),
        *sample_tables(two_ends(configs, measure)),
    ]
    brief = [block for block in conclusions if block[0] in ("warning", "paragraph")]
    title = f"Training report: {len(configs)} configuration{'s' * (len(configs) > 1)}, {len(runs)} runs"
    return title, blocks, figures | more, [*(("warning", w) for w in warnings), *brief, *means]


def judge(configs: list[Configuration], margins: dict) -> list[tuple]:
    """The verdict, under notes on its runs; a warning instead where perplexities do not compare."""
    notes = divergence_notes([run for config in configs for run in config.runs])
    try:
        heading, *blocks = verdict_blocks(verdict(configs, **margins))
        return [heading, *(("warning", note) for note in notes), *blocks]
    except InputError as e:
        return [("warning", f"No verdict: {e}.")]


def two_ends(configs: list[Configuration], measure: str) -> list[Run]:
    """A run of the baseline, and one of the low-rank configuration that ended best: their samples stand for all."""
    y_key = MEASURES[measure][0]
    low = [c for c in configs if c.low_rank and c.values(y_key)]
    ends = [baseline(configs, y_key), min(low, key=lambda c: c.mean(y_key), default=None)]
    runs = [next(filter(finished, c.runs), None) for c in ends if c]
    return [run for run in runs if run]


# ---- reading --------------------------------------------------------------------------------------------------------


def load_runs(given: list[str], wandb_spec: str = "") -> list[Run]:
    """The runs in the order given, with names that tell them apart; then those of W&B."""
    folders = [find_run(text) for text in given]
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise InputError(f"{given[i]}: this run is given twice")
    runs = [dataclasses.replace(load_run(folder), core=newest_core(folder)) for folder in folders]
    tags = [run.name for run in runs]
    runs = [
        run if tags.count(run.name) == 1 else dataclasses.replace(run, name=str(folder))
        for run, folder in zip(runs, folders)
    ]
    if wandb_spec:
        from nanochat.report.wandb_import import runs_from_wandb

        fetched = runs_from_wandb(wandb_spec)
        if twice := [run.name for run in fetched if run.name in tags]:
            raise InputError(
                f"--from-wandb {wandb_spec}: {join_names(twice)} is given as a folder too; leave one of them out"
            )
        runs += fetched
    return [with_newest_values(checked_run(run)) for run in runs]


def with_newest_values(run: Run) -> Run:
    """The summary of an unfinished run dates from its last checkpoint; the history knows more. And what follows from a summary."""
    summary = dict(run.summary)
    if not finished(run):
        for entry in run.history:
            summary.update({k: v for k, v in entry.items() if isinstance(v, (int, float))})
    run = dataclasses.replace(run, summary=summary)
    return dataclasses.replace(run, summary={**summary, **derived(run)})


def find_run(text: str) -> Path:
    """The folder of a tag under runs/, or else of a path."""
    folder = runs_dir() / text
    if folder.is_dir() and os.sep not in text:
        return folder
    if Path(text).is_dir():
        return Path(text)
    raise InputError(f"no run {quoted(text)}: not a folder, and {no_such_run(text)}")


def derived(run: Run) -> dict:
    """What follows from the summary: tokens/s over the whole run, and what the known parts leave of a CUDA peak (bytes)."""
    values = {}
    tokens = summary_number(run, "total_tokens")
    seconds = summary_number(run, "total_training_time")
    if tokens and seconds:
        values["mean_tok_per_sec"] = (
            tokens / seconds
        )  # train/tok_per_sec is the last step's alone: too noisy to compare
    peak, *parts = (
        summary_number(run, f"mem/{part}_bytes") for part in ("peak", "weights", "grads", "optimizer")
    )
    if config_value(run, "device.type") == "cuda" and None not in (peak, *parts) and sum(parts) <= peak:
        values["mem/rest_bytes"] = peak - sum(parts)
    return values


if __name__ == "__main__":
    run_script(main)
