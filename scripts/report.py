"""Compare finished or running runs, from their folders or W&B: report.md, .html, .csv and the figures.

    python -m scripts.report full lowrank --out report/
    python -m scripts.report full_* low_* --out report/

With several seeds, or more than a few configurations, the report also has means over seeds. For the shell to
expand the *, run it where the tags are folders (cd runs), or give paths.
"""

import dataclasses
import os
import sys
from pathlib import Path

from nanochat import arguments
from nanochat.arguments import ArgumentParser, quoted
from nanochat.common import run_script
from nanochat.errors import InputError
from nanochat.eval_results import newest_core
from nanochat.files import check_out, write_atomic
from nanochat.metrics import Run, load_run, runs_dir
from nanochat.naming import no_such_run
from nanochat.report import comparable, csv_export, run_tables, sweep_tables
from nanochat.report.comparable import SAME_TEXT, SAME_TOKENIZER, join_names
from nanochat.report.configurations import Configuration, configurations, finished, run_value
from nanochat.report.equal_cost import equal_cost_table
from nanochat.report.method_section import method_section
from nanochat.report.page import encode, markdown_text, to_markdown, to_page
from nanochat.report.run_check import checked_run
from nanochat.report.run_figures import RUN_CAPTIONS, draw_run_figures, labels_in_words
from nanochat.report.summaries import MEASURES, baseline
from nanochat.report.sweep_figures import draw_sweep_figures, figure_caption
from nanochat.report.verdict import verdict
from nanochat.report.verdict_page import verdict_blocks

DEFINITIONS = {
    "×0.53": "the value divided by the first run's. Shown only where the two may be divided.",
    "validation loss": "mean negative log likelihood in nats per token on fixed validation rows. Lower is "
    "better.",
    "perplexity (ppl)": "exp(validation loss). It depends on the tokenizer: comparable only under the same "
    "one.",
    "bits per byte (bpb)": "the same loss in bits, per byte of the text instead of per token: comparable "
    "across tokenizers on the same validation text.",
    "parameters": "scalars of the model, embeddings included. A matrix of rank r counts its two factors, "
    "r × (in + out).",
    "FLOPs": "counted from what is executed: 6 FLOPs for each token and each matrix parameter that it uses, "
    "factors included, plus attention.",
    "time": "training steps only: the clock excludes evaluation, checkpointing and compilation.",
    "tokens/s": "training tokens per second of that clock, over the whole run and all processes.",
    "time, tokens, FLOPs to perplexity P": "at the first evaluation at or below P. Interpolated: an estimate "
    "between the two evaluations around P, linear in log perplexity, which depends less on how often the "
    "run was evaluated.",
    "peak memory": "of one process. CUDA: the most bytes torch had allocated; what weights, gradients and "
    "optimizer state leave of it is “activations and other”. CPU: the peak resident set of the whole "
    "process.",
}


def main(argv=None):
    args = parse(argv)
    margins = {
        "margin_time": args.margin_time,
        "margin_memory": args.margin_memory,
        "margin_ppl": args.margin_ppl,
        "confidence": args.confidence,
        "equal_params": args.equal_params,
    }
    verdict([], **margins)  # InputError if a margin is out of range
    check_out("--out", args.out)

    runs = load_runs(args.runs, args.from_wandb)
    configs = configurations(runs)
    is_sweep = len(configs) > run_tables.MAX_COLUMNS or any(len(c.runs) > 1 for c in configs)
    make_report = sweep_report if is_sweep else run_report
    title, blocks, figures, terminal_blocks = make_report(runs, configs, margins)
    definitions = [f"**{term}**: {meaning}" for term, meaning in DEFINITIONS.items()]
    blocks += [("heading", "How to read this"), ("list", definitions)]

    sys.stdout.reconfigure(errors="replace")  # a terminal without "×" must not cost the user the table
    print(to_markdown(terminal_blocks), flush=True)  # first, so that it is seen even if writing fails
    for name, figure in figures.items():
        write_atomic(args.out / name, figure[0] if isinstance(figure, tuple) else figure)
    config_names = {run.name: c.name for c in configs for run in c.runs}
    csv = csv_export.to_csv(runs, config_names, csv_export.pair_keys(configs))
    write_atomic(args.out / "report.csv", encode(csv))
    write_atomic(args.out / "report.md", encode(f"# {markdown_text(title)}\n\n" + to_markdown(blocks)))
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
        type=arguments.real_number(),
        default=0.0,
        help="H1: the share by which time per step must be below full rank's",
    )
    add(
        "--margin-memory",
        type=arguments.real_number(),
        default=0.0,
        help="H1: the share by which memory must be below full rank's",
    )
    add(
        "--margin-ppl",
        type=arguments.real_number(),
        default=0.05,
        help="H2: the share of perplexity that counts as little",
    )
    add(
        "--equal-params",
        type=arguments.real_number(),
        default=0.02,
        help="H3: the share by which equal numbers of parameters may differ",
    )
    add(
        "--confidence",
        type=arguments.real_number(),
        default=0.95,
        help="of all intervals of a hypothesis together",
    )
    args = parser.parse_args(argv)
    if not args.runs and not args.from_wandb:
        raise InputError("give RUN (tags or run folders), or --from-wandb ENTITY/PROJECT[/GROUP]")
    return args


# ---- the two reports: (title, blocks of the page, figures, blocks for the terminal) ------------------------


def run_report(runs: list[Run], configs: list[Configuration], margins: dict):
    """A few runs side by side."""
    broken, warnings, notes = comparable.check_comparable(runs)
    notes += comparable.divergence_notes(runs)
    warning_blocks = [("warning", text) for text in warnings]
    result_tables = run_tables.result_tables(runs, broken)
    measure = "bpb" if broken[SAME_TEXT] or broken[SAME_TOKENIZER] else "loss"
    labels = labels_in_words(configs)
    figures = draw_run_figures([dataclasses.replace(run, name=labels[run.name]) for run in runs], measure)
    method_blocks, method_figures = method_section(configs, measure)
    has_both_kinds = {c.low_rank for c in configs if not c.method} == {True, False}
    blocks = [
        ("heading", "Results"),
        *warning_blocks,
        *run_tables.ratio_summary(runs, broken),
        *result_tables,
        *list_blocks(notes),
        *run_tables.core_tables(runs),
        *(judge(configs, margins) if has_both_kinds else []),
        ("heading", "Figures"),
        *list_blocks([f"**{label}** is the run {tag}" for tag, label in labels.items() if label != tag]),
        *(("figure", name, caption) for name, caption in RUN_CAPTIONS.items()),
        *method_blocks,
        ("heading", "What was compared"),
        *run_tables.setup_tables(runs),
        *run_tables.sample_tables(runs),
    ]
    title = "Training report: " + join_names([run.name for run in runs])
    return title, blocks, figures | method_figures, [*warning_blocks, *result_tables]


def sweep_report(runs: list[Run], configs: list[Configuration], margins: dict):
    """Many runs, by configuration: the verdict first."""
    finished_runs = [run for run in runs if finished(run)]
    if not finished_runs:
        raise InputError(
            f"none of the {len(runs)} runs is finished: {join_names([run.name for run in runs])}; "
            "finish them, or report a few at a time"
        )
    broken, warnings, notes = comparable.check_comparable(finished_runs)
    if broken[SAME_TEXT]:
        raise InputError(
            f"{join_names(broken[SAME_TEXT])}: not evaluated, on record, on the validation text of "
            f"{finished_runs[0].name}, so neither perplexity nor bits per byte compares; "
            "report each text by itself"
        )
    measure = "bpb" if broken[SAME_TOKENIZER] else "loss"
    # a sweep has different seeds on purpose
    notes = [note for note in notes if not note.startswith("Different seed")]
    notes += comparable.divergence_notes(runs) + left_out_notes(runs, configs, measure)
    warning_blocks = [("warning", text) for text in warnings]
    # a sweep of adapters or subspaces without low rank has no hypothesis to judge
    is_judged = any(c.low_rank for c in configs) or not any(c.method for c in configs)
    conclusions = judge(configs, margins) if is_judged else []
    # the cost of an adapter does not include its base model: it is not compared with other runs
    scratch = [c for c in configs if not c.settings.get("adapter")] or configs
    means = sweep_tables.configurations_table(configs, measure) + equal_cost_table(scratch)
    figures = draw_sweep_figures(scratch, measure)
    method_blocks, method_figures = method_section(configs, measure)
    blocks = [
        *warning_blocks,
        *conclusions,
        ("heading", "Figures"),
        *(("figure", name, figure_caption(name, scratch)) for name in figures),
        *method_blocks,
        ("heading", "Results"),
        *means,
        ("subheading", "Runs"),
        sweep_tables.runs_table(configs, measure),
        *sweep_tables.frontier_table(scratch, measure),
        *list_blocks(notes),
        *run_tables.core_tables(finished_runs),
        ("heading", "What was compared"),
        ("paragraph", "One run of each configuration."),
        *run_tables.setup_tables([dataclasses.replace(c.runs[0], name=c.name) for c in configs]),
        *run_tables.sample_tables(baseline_and_best(configs, measure)),
    ]
    brief = [block for block in conclusions if block[0] in ("warning", "paragraph")]
    noun = "configuration" if len(configs) == 1 else "configurations"
    title = f"Training report: {len(configs)} {noun}, {len(runs)} runs"
    return title, blocks, figures | method_figures, [*warning_blocks, *brief, *means]


def list_blocks(items: list[str]) -> list[tuple]:
    """A list as blocks of the page; no block without items."""
    return [("list", items)] if items else []


def left_out_notes(runs: list[Run], configs: list[Configuration], measure: str) -> list[str]:
    """Notes on the runs that are not in the verdict, the means and the figures."""
    notes = []
    unfinished = [run.name for run in runs if not finished(run)]
    if unfinished:
        notes.append(
            f"Unfinished, and left out of the verdict, the means and the figures: {join_names(unfinished)}."
        )
    with_finished = [c for c in configs if any(map(finished, c.runs))]
    without_mean = [c.name for c in with_finished if not c.values(MEASURES[measure][0])]
    if without_mean:
        notes.append(f"Diverged on every seed, so without a mean: {join_names(without_mean)}.")
    return notes


def judge(configs: list[Configuration], margins: dict) -> list[tuple]:
    """The verdict, under notes on its runs; a warning instead where perplexities do not compare."""
    notes = comparable.divergence_notes([run for config in configs for run in config.runs])
    try:
        heading, *blocks = verdict_blocks(verdict(configs, **margins))
        return [heading, *(("warning", note) for note in notes), *blocks]
    except InputError as e:
        return [("warning", f"No verdict: {e}.")]


def baseline_and_best(configs: list[Configuration], measure: str) -> list[Run]:
    """A run of the baseline and one of the best low-rank configuration, whose samples are shown."""
    y_key = MEASURES[measure][0]
    low = [c for c in configs if c.low_rank and c.values(y_key)]
    chosen = [baseline(configs, y_key), min(low, key=lambda c: c.mean(y_key), default=None)]
    runs = [next(filter(finished, c.runs), None) for c in chosen if c]
    return [run for run in runs if run]


# ---- reading -----------------------------------------------------------------------------------------------


def load_runs(words: list[str], wandb_spec: str = "") -> list[Run]:
    """The runs of the command line in its order, with different names; then those of W&B.

    words: tags, or paths to run folders.
    """
    folders = [find_run(word) for word in words]
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise InputError(f"{words[i]}: this run is given twice")
    runs = [dataclasses.replace(load_run(folder), core=newest_core(folder)) for folder in folders]
    tags = [run.name for run in runs]
    for i, folder in enumerate(folders):
        if tags.count(tags[i]) > 1:
            runs[i] = dataclasses.replace(runs[i], name=str(folder))
    if wandb_spec:
        from nanochat.report.wandb_import import runs_from_wandb

        fetched = runs_from_wandb(wandb_spec)
        twice = [run.name for run in fetched if run.name in tags]
        if twice:
            problem = f"{join_names(twice)} is given as a folder too; leave one of them out"
            raise InputError(f"--from-wandb {wandb_spec}: {problem}")
        runs += fetched
    return [with_newest_values(checked_run(run)) for run in runs]


def with_newest_values(run: Run) -> Run:
    """The run with the newest values in its summary, and those derived from them.

    The summary of an unfinished run dates from its last checkpoint; the history knows more.
    """
    summary = dict(run.summary)
    if not finished(run):
        for row in run.history:
            summary.update({key: x for key, x in row.items() if isinstance(x, (int, float))})
    run = dataclasses.replace(run, summary=summary)
    return dataclasses.replace(run, summary={**summary, **derived_values(run)})


def find_run(text: str) -> Path:
    """The folder of a tag under runs/, or else of a path."""
    folder = runs_dir() / text
    if folder.is_dir() and os.sep not in text:
        return folder
    if Path(text).is_dir():
        return Path(text)
    raise InputError(f"no run {quoted(text)}: not a folder, and {no_such_run(text)}")


def derived_values(run: Run) -> dict:
    """tokens/s over the whole run, and the bytes of a CUDA peak that are none of the known parts."""
    values = {}
    tokens = run_value(run, "total_tokens")
    seconds = run_value(run, "total_training_time")
    if tokens and seconds:  # train/tok_per_sec is the last step's alone: too noisy to compare
        values["mean_tok_per_sec"] = tokens / seconds
    peak, *parts = (run_value(run, f"mem/{part}_bytes") for part in ("peak", "weights", "grads", "optimizer"))
    on_cuda = comparable.config_value(run, "device.type") == "cuda"
    if on_cuda and None not in (peak, *parts) and sum(parts) <= peak:
        values["mem/rest_bytes"] = peak - sum(parts)
    return values


if __name__ == "__main__":
    run_script(main)
