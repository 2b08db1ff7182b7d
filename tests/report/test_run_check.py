"""Odd values anywhere in a run's config or summary: the report shows the run, or refuses it in one line."""

import copy
import json
import random

import pytest
from conftest import ODD
from test_report import base, write_sweep  # noqa: F401  a fixture

from nanochat import metrics
from nanochat.errors import InputError
from nanochat.report.configurations import configurations
from nanochat.report.csv_export import to_csv
from nanochat.report.equal_cost import equal_cost_table
from nanochat.report.page import to_markdown
from nanochat.report.run_tables import result_tables, setup_tables
from scripts import report

ODD_CONFIGS = [*ODD, 0, float("inf"), 10**25, "x", "q=1", [None], [1, "x"], {"a": [1]}, "\ud800"]
EXTRA = {
    "flags.adapter": "",
    "flags.layer_map": "",
    "flags.matrix_ranks": "",
    "flags.subspace": "",
    "flags.subspace_dim": 0,
    "flags.solve": None,
    "flags.mlp_ratio": 4.0,
    "derived.model.matrix_ranks": {},
    "derived.model.mlp_ratio": 4.0,
    "derived.model.layer_map": [],
    "summary.train/bad_steps": 0,
    "summary.adalora/ranks": {},
    "summary.new": 1,
}


def places(tree, path=()):
    for key, value in tree.items():
        yield ".".join((*path, key))
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def changed(tree, path, value):
    tree = copy.deepcopy(tree)
    part = tree
    *parents, last = path.split(".", 3 if path.startswith("derived.") else 1)
    for key in parents:
        part = part[key]
    part[last] = value
    return tree


def test_no_value_of_a_run_raises_more_than_a_line_in_the_report(base):  # noqa: F811
    tags = write_sweep(base)
    first = metrics.load_run(base / "runs" / tags[0])
    whole = {**first.config, "summary": first.summary}
    rng = random.Random(0)
    outcomes = []
    for path in [*places(whole), *EXTRA]:
        for odd in rng.sample(ODD_CONFIGS, rng.choice((0, 0, 1))):
            content = changed(whole, path, odd)
            summary = content.pop("summary")
            if not isinstance(summary, dict) or not isinstance(content["flags"], dict):
                continue  # no such file is read
            (base / "runs" / tags[0] / "config.json").write_text(json.dumps(content))
            (base / "runs" / tags[0] / "summary.json").write_text(json.dumps({"status": "x", **summary}))
            outcomes.append(outcome(tags[:3]))
    assert 5 < sum(outcomes) < len(outcomes) - 5


def outcome(tags) -> bool:
    """Whether the runs were taken. An InputError is fine; any other error fails the test."""
    try:
        runs = report.load_runs(tags)
        configs = configurations(runs)
        broken, *_ = report.comparable.check_comparable(runs)
        blocks = [
            *result_tables(runs, broken),
            *setup_tables(runs),
            *equal_cost_table(configs),
            *report.judge(configs, {}),
            report.sweep_tables.runs_table(configs, "loss"),
            *report.sweep_tables.configurations_table(configs, "loss"),
        ]
        to_markdown(blocks)
        names = {run.name: c.name for c in configs for run in c.runs}
        to_csv(runs, names, report.csv_export.pair_keys(configs))
        return True
    except InputError as e:
        assert "\n" not in str(e) and len(str(e)) < 500
        return False


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_file_of_a_thousand_lists_in_one_another_is_damaged(base, name):  # noqa: F811
    [tag, *_] = write_sweep(base)
    path = base / "runs" / tag / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content)[:-1] + ', "new": ' + "[" * 900 + "]" * 900 + "}")
    with pytest.raises(InputError, match=f"{name}: "):
        report.load_runs([tag])
