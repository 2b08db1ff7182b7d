"""Maps of a finished model's layers: which there are, what the model under one is, and what the script writes."""
import csv
import itertools
import math

import pytest
import torch

from nanochat.common import InputError
from nanochat.factorize import with_layer_map
from nanochat.gpt import GPT, GPTConfig
from scripts import layer_map_eval
from scripts.layer_map_eval import drawn, listed, monotone


@pytest.mark.parametrize("layers,positions,count", [(4, 8, 35), (4, 12, 165), (4, 4, 1), (1, 3, 1), (2, 5, 4)])
def test_monotone_maps_are_all_that_keep_the_order(layers, positions, count):
    maps = monotone(layers, positions)
    everything = itertools.product(range(layers), repeat=positions) if layers**positions < 10**5 else maps
    assert len(maps) == count and sorted(maps) == sorted(m for m in everything if list(m) == sorted(m) and set(m) == set(range(layers)))


def test_random_maps_are_distinct_out_of_order_and_seeded():
    maps = drawn(3, 4, 20, seed=1)
    assert len(set(maps)) == 20 and all(list(m) != sorted(m) for m in maps)
    assert maps == drawn(3, 4, 20, seed=1) != drawn(3, 4, 20, seed=2)
    assert sorted(drawn(2, 3, 99, seed=0)) == [(0, 1, 0), (1, 0, 0), (1, 0, 1), (1, 1, 0)]  # there are no more


def test_the_model_under_a_map_executes_its_layers_in_that_order():
    torch.manual_seed(0)
    model = GPT(GPTConfig(sequence_len=16, vocab_size=50, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SL", mlp_ranks=(4, 8, 0)))
    model.init_weights()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    idx = torch.randint(0, 50, (2, 16))
    executed = []
    for layer, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, output, layer=layer: executed.append((layer, args[2].tolist())))
    scalars = torch.stack((model.resid_lambdas, model.x0_lambdas), dim=1).tolist()
    under = with_layer_map(model, (2, 0, 0, 1))
    under.blocks = model.blocks  # with the hooks; its own hold the same weights
    under(idx)
    assert executed == [(layer, scalars[layer]) for layer in (2, 0, 0, 1)]
    own = with_layer_map(model, (0, 1, 2))
    assert torch.equal(own(idx), model(idx)) and own.blocks[0].mlp.up.A.data_ptr() == model.blocks[0].mlp.up.A.data_ptr()


def test_the_script_writes_every_map_best_first(train, tmp_path, capsys):
    run = train("--attn-rank", 8, tag="two")
    capsys.readouterr()
    layer_map_eval.main(["--model-tag", "two", "--all-monotone", "3", "--maps", "1,0", "--random", "2", "--positions", "3", "--out", str(tmp_path / "maps")])
    rows = list(csv.DictReader((tmp_path / "maps/layer_maps.csv").open()))
    assert [float(row["val/loss"]) for row in rows] == sorted(float(row["val/loss"]) for row in rows)
    assert {"0 1", "0 0 1", "0 1 1", "1 0"} < {row["map"] for row in rows} and len(rows) == 6
    itself = next(row for row in rows if row["as_it_is"] == "1")
    assert itself["map"] == "0 1" and float(itself["val/loss"]) == pytest.approx(run.summary["val/loss"], abs=1e-6)
    assert math.exp(float(itself["val/loss"])) == pytest.approx(float(itself["val/ppl"]))
    assert (tmp_path / "maps/layer_maps.png").read_bytes().startswith(b"\x89PNG") and capsys.readouterr().out.count("ppl") == 6
    for flags, message in ((["--maps", "0,2"], r"--maps 0,2: give layers from 0 to 1"), (["--all-monotone", "1"], r"--all-monotone 1: the model has 2 layers"),
                           ([], r"--maps, --all-monotone, --random: give at least one")):
        with pytest.raises(InputError, match=message):
            layer_map_eval.main(["--model-tag", "two", *flags])
    with pytest.raises(InputError, match="none"):
        layer_map_eval.main(["--model-tag", "none", "--random", "1"])


def test_listed_maps():
    assert listed("0,1,1  1", 2) == [(0, 1, 1), (1,)]
    with pytest.raises(InputError, match="--maps 0,,1"):
        listed("0,,1", 2)
