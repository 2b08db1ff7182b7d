"""The CSV of the report: a row for each run, for spreadsheets and scripts."""

import csv
import io
import re

from nanochat.metrics import Run
from nanochat.report.comparable import config_value
from nanochat.report.configurations import Configuration, run_seed, step_seconds
from nanochat.report.pairing import CONTEXT, SHAPE, values_of
from nanochat.report.run_tables import SECTIONS

FORMULA = re.compile(r"\s*[=+@\t\r-]")  # begins what a spreadsheet computes


def to_csv(runs: list[Run], configurations: dict[str, str], pairs: dict[str, str]) -> str:
    """One row a run, numbers as recorded: what the tables show, every other summary value, the set-up, all flags.

    configurations, pairs: {run's name: its configuration; "group:seed", the same in runs that the verdict may pair}. step_time: seconds.
    """
    paths = (
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
    listed = ["status", "step"] + [key for _, metrics in SECTIONS for key, *_ in metrics]
    others = sorted(
        {k for run in runs for k, v in run.summary.items() if isinstance(v, (int, float, str))} - set(listed)
    )
    rows = [
        {
            "run": run.name,
            "configuration": configurations[run.name],
            "pair": pairs[run.name],
            "step_time": step_seconds(run),
            **{key: run.summary.get(key) for key in listed + others},
            **{path: config_value(run, path) for path in paths},
            **{f"flags.{k}": v for k, v in (config_value(run, "flags") or {}).items()},
        }
        for run in runs
    ]
    out = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(in_csv, columns))
    writer.writerows([in_csv(row.get(column)) for column in columns] for row in rows)
    return out.getvalue()


def in_csv(cell):
    """A cell that no spreadsheet takes for a formula: text that looks like one begins with an apostrophe."""
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def pair_keys(configs: list[Configuration]) -> dict[str, str]:
    """{run's name: "group:seed"}: in one group are the runs whose data, tokens, batch, schedule, depth and width are the same."""
    groups = {}
    alike = {
        c.name: (*values_of(c, (*CONTEXT, *SHAPE)), c.name if c.method else "") for c in configs
    }  # of another method none may be paired
    return {
        run.name: f"{groups.setdefault(alike[c.name], len(groups) + 1)}:{run_seed(run)}"
        for c in configs
        for run in c.runs
    }
