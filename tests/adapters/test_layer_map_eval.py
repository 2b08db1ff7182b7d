"""The script that evaluates maps of a finished model's layers: what it finds, writes and refuses."""

import csv
import math

import pytest
import torch

from nanochat import metrics
from nanochat.adapters.loading import load_model
from nanochat.checkpoint_manager import amend_checkpoint
from nanochat.errors import InputError
from nanochat.layer_maps import with_copied_layers
from nanochat.loss_eval import evaluate, validation_rows
from nanochat.processes import World
from nanochat.tokenizer import Tokenizer
from scripts import layer_map_eval


def run_main(*flags) -> None:
    layer_map_eval.main(["--model-tag", "two", *map(str, flags)])


def test_the_script_writes_every_map_best_first(train, tmp_path, capsys):
    run = train("--attn-rank", 8, tag="two")
    capsys.readouterr()
    run_main(
        "--all-monotone",
        3,
        "--maps",
        "1,0 mobilellm",
        "--random",
        2,
        "--positions",
        3,
        "--out",
        tmp_path / "maps",
    )
    rows = list(csv.DictReader((tmp_path / "maps/layer_maps.csv").open()))
    assert [float(row["val/loss"]) for row in rows] == sorted(float(row["val/loss"]) for row in rows)
    assert {"0 1", "0 0 1", "0 1 1", "1 0", "0 0 1 1"} < {row["map"] for row in rows} and len(rows) == 7
    assert {row["map"]: row["name"] for row in rows if row["name"]} == {
        "0 1": "two as it is",
        "0 0 1 1": "mobilellm",
    }
    itself = next(row for row in rows if row["as_it_is"] == "1")
    assert itself["map"] == "0 1" and float(itself["val/loss"]) == pytest.approx(
        run.summary["val/loss"], abs=1e-6
    )
    assert math.exp(float(itself["val/loss"])) == pytest.approx(float(itself["val/ppl"]))
    assert (tmp_path / "maps/layer_maps.png").read_bytes().startswith(
        b"\x89PNG"
    ) and capsys.readouterr().out.count("ppl") == 7
    for flags, message in (
        (["--maps", "0,2"], "--maps 0,2: there is no layer 2, the layers are 0 to 1"),
        (["--maps", "0;1"], "--maps 0;1: give the layer at each"),
        (["--all-monotone", 1], "--all-monotone 1: the model has 2 layers"),
        ([], "--maps, --all-monotone, --random: give at least one"),
        (
            ["--maps", "1", "--eval-tokens", 31],
            "--eval-tokens 31: less than one row of 32 tokens; give more$",
        ),
        (
            ["--maps", "0 goliath"],
            "--maps goliath: takes layers of a second checkpoint; name its run with --second-tag",
        ),
        (["--maps", "A:0,B:1", "--second-tag", "none"], "--second-tag none: no such run in"),
        (["--maps", "0", "--second-tag", "two"], "--second-tag two: no map takes its layers"),
    ):
        with pytest.raises(InputError, match=message):
            run_main(*flags)
    with pytest.raises(InputError, match="none"):
        layer_map_eval.main(["--model-tag", "none", "--random", "1"])


def test_layers_of_two_runs(train, tmp_path):
    one, other = (
        train("--depth", 3, "--num-iterations", 2, "--seed", seed, tag=tag)
        for seed, tag in ((1, "two"), (2, "b"))
    )
    run_main("--second-tag", "b", "--maps", "A:0,B:2 goliath", "--out", tmp_path)
    rows = {row["name"] or row["map"]: row for row in csv.DictReader((tmp_path / "layer_maps.csv").open())}
    assert {name: row["map"] for name, row in rows.items()} == {
        "two as it is": "0 1 2",
        "b as it is": "B:0 B:1 B:2",
        "A:0 B:2": "A:0 B:2",
        "goliath": "A:0 A:1 B:1 B:2",
    }
    for run, name in ((one, "two as it is"), (other, "b as it is")):
        assert float(rows[name]["val/loss"]) == pytest.approx(run.summary["val/loss"], abs=1e-6)
    model, tokenizer, _ = load_model(metrics.runs_dir() / "two", 2)
    second, _, _ = load_model(metrics.runs_dir() / "b", 2)
    found = evaluate(
        with_copied_layers(model, (0, 5), second),
        validation_rows(one, tokenizer, 32, 1024),
        4,
        World(torch.device("cpu")),
        torch.float32,
    )
    assert float(rows["A:0 B:2"]["val/loss"]) == pytest.approx(found["val/loss"], abs=1e-6)

    train("--num-iterations", 1, tag="shallow")
    with pytest.raises(
        InputError,
        match=r"--second-tag shallow: of another shape than the first, .*: n_layer \(2 there, 3 here\)",
    ):
        run_main("--second-tag", "shallow", "--maps", "goliath")
    other = Tokenizer(
        tokenizer.pattern, [*tokenizer.tokens[:-2], tokenizer.tokens[-1], tokenizer.tokens[-2]], {}
    )
    other.save(metrics.runs_dir() / "b/tokenizer.json")
    amend_checkpoint(metrics.runs_dir() / "b", 2, {"tokenizer_hash": other.hash})
    with pytest.raises(InputError, match="--second-tag b: has another tokenizer"):
        run_main("--second-tag", "b", "--maps", "goliath")
