"""eval_<step>.json and core_<step>.json: reading them, finding the newest, and one line for any damage."""

import copy
import json
import random

import pytest
from conftest import ODD
from test_report import base, write_run  # noqa: F401  a fixture

from nanochat.eval_results import earlier_results, newest_core, read_core, read_eval
from scripts import report

CORE = {
    "settings": {"model_tag": "full", "step": 200, "bundle": "ab", "max_per_task": -1, "dtype": "auto"},
    "bundle_sha256": None,
    "core_metric": 0.25,
    "core_metric_interval": [0.2, 0.3],
    "centered_results": {"a": 0.25},
    "tasks": {
        "a": {
            "accuracy": 0.4,
            "baseline": 0.2,
            "centered": 0.25,
            "correct": 4,
            "examples": 10,
            "centered_interval": [0.2, 0.3],
        }
    },
}
EVAL = {
    "settings": {"model_tag": "full", "step": 200},
    "data": "stdlib",
    "text_of_the_run": True,
    "sample": ["a"],
}
EVAL |= {f"{split}/{key}": 1 for split in ("train", "val") for key in ("loss", "ppl", "bpb", "tokens")}
ODD_RESULTS = [*ODD, 10**400, "x", {"a": {}}, [None, None]]


def write_core(folder, step, value=0.25):
    content = copy.deepcopy(CORE) | {"core_metric": value}
    content["settings"]["step"] = step
    (folder / f"core_{step:06d}.json").write_text(json.dumps(content))


def test_the_newest_core_is_that_of_the_highest_step(tmp_path):
    for step in (999_999, 200, 1_000_000):  # in the order of names 1000000 comes before 999999
        write_core(tmp_path, step)
    (tmp_path / "core_copy.json").write_text("{")
    assert newest_core(tmp_path)["settings"]["step"] == 1_000_000


def places(tree, path=()):
    """The path to every value in a tree of dicts and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def with_value(tree, path, value):
    tree = copy.deepcopy(tree)
    part = tree
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return tree


@pytest.mark.parametrize("name, content, read", [("core", CORE, read_core), ("eval", EVAL, read_eval)])
def test_no_damage_to_a_result_raises_more_than_a_line(tmp_path, capsys, name, content, read):
    path = tmp_path / f"{name}_000200.json"
    path.write_text(json.dumps(content))
    assert read(path) == content
    damaged = [with_value(content, place, odd) for place in places(content) for odd in ODD_RESULTS]
    texts = [
        *map(json.dumps, random.Random(1).sample(damaged, 100)),
        *map(json.dumps, ODD_RESULTS),
        "[" * 10_000,
        json.dumps(content)[:-9],
    ]
    for text in texts:
        path.write_text(text)
        results = earlier_results(path, read)
        output = capsys.readouterr().out
        assert bool(results) == (not output) and output.count("\n") <= 1
        if output:
            assert output.startswith(f"note: {path}") and output.endswith("; it counts as missing\n")
            assert len(output) < 400


def test_a_report_shows_whatever_core_result_it_takes_and_names_the_others(base, capsys):  # noqa: F811
    folder = write_run(base, "full")
    write_core(folder, 100, 0.125)
    shown = 0
    damaged = [with_value(CORE, place, odd) for place in places(CORE) for odd in ODD_RESULTS]
    for content in random.Random(0).sample(damaged, 60):
        (folder / "core_000200.json").write_text(json.dumps(content))
        [run] = report.load_runs(["full"])
        tables = str(report.run_tables.core_tables([run]))
        named = "core_000200.json" in capsys.readouterr().out
        assert named == ("0.1250 (" in tables) and ("'200'" in tables) != named
        if not named:
            shown += 1
    assert 0 < shown < 60
