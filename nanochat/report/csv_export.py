"""The CSV of the report: a row for each run, for spreadsheets and scripts."""

import csv
import io
import re

from nanochat.metrics import Run
from nanochat.report.comparable import config_value
from nanochat.report.configurations import Configuration, run_seed, step_seconds
from nanochat.report.pairing import CONTEXT, SHAPE, values_of
from nanochat.report.run_tables import SECTIONS

FORMULA = re.compile(r"\s*[=+@\t\r-]")  # a spreadsheet computes a text that begins so
CONFIG_PATHS = (
    "device.type",
    "device.name",
    "device.processes",
    "device.dtype",
    "seed",
    "git.commit",
    "git.dirty",
    "derived.corpus.name",
    "derived.corpus.val_fingerprint",
    "derived.tokenizer_hash",
    "derived.num_iterations",
    "derived.total_batch_size",
    "derived.model.n_layer",
    "derived.model.n_embd",
    "derived.model.attn_ranks",
    "derived.model.mlp_ranks",
    "derived.model.lm_head_rank",
)


def to_csv(runs: list[Run], configurations: dict[str, str], pairs: dict[str, str]) -> str:
    """One row for each run: names, summary, set-up and all flags; numbers as they were recorded.

    configurations: {run's name: its configuration}. pairs: see pair_keys. The column step_time is in seconds.
    """
    table_keys = [key for _, metrics in SECTIONS for key, *_ in metrics]
    keys = ["status", "step", *table_keys, *other_summary_keys(runs, {"status", "step", *table_keys})]
    rows = []
    for run in runs:
        flags = config_value(run, "flags") or {}
        names = {"run": run.name, "configuration": configurations[run.name], "pair": pairs[run.name]}
        summary = {"step_time": step_seconds(run)} | {key: run.summary.get(key) for key in keys}
        config = {path: config_value(run, path) for path in CONFIG_PATHS}
        rows.append(names | summary | config | {f"flags.{flag}": value for flag, value in flags.items()})
    columns = list(dict.fromkeys(column for row in rows for column in row))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(csv_cell, columns))
    for row in rows:
        writer.writerow([csv_cell(row.get(column)) for column in columns])
    return file.getvalue()


def other_summary_keys(runs: list[Run], table_keys: set[str]) -> list[str]:
    """The keys that hold a number or a text in the summary of any run, without `table_keys`."""
    keys = set()
    for run in runs:
        keys |= {key for key, value in run.summary.items() if isinstance(value, (int, float, str))}
    return sorted(keys - table_keys)


def csv_cell(value):
    """The value, with an apostrophe before a text that a spreadsheet would take for a formula."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def pair_keys(configs: list[Configuration]) -> dict[str, str]:
    """{run's name: "group:seed"}, equal for runs that can form a pair.

    Runs of one group have the same data, tokens, batch, schedule, depth and width. Adapters and subspaces
    form no pairs, so each of their configurations is a group of its own.
    """
    groups = {}
    keys = {}
    for config in configs:
        alone = config.name if config.method else ""
        group = groups.setdefault((*values_of(config, (*CONTEXT, *SHAPE)), alone), len(groups) + 1)
        keys |= {run.name: f"{group}:{run_seed(run)}" for run in config.runs}
    return keys
