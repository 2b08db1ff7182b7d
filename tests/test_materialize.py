"""Merging, truncating, exporting: against numpy's SVD, the model itself, and a pass in plain PyTorch."""

import ast
import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import metrics
from nanochat.adapters.loading import load_model
from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
from nanochat.dataset import open_corpus
from nanochat.errors import InputError
from nanochat.factorize import linear_layers, merge, rank_of_energy, truncate
from nanochat.gpt import GPT, GPTConfig
from scripts import base_eval, materialize, report

PLAIN = Path(__file__).parents[1] / "dev/plain_forward.py"
SHAPES = {
    "grouped queries, windows": dict(n_layer=3, n_kv_head=2, window_pattern="SL"),
    "tied": dict(tie_embeddings=True),
    "value embeddings": dict(n_layer=3, n_kv_head=1, value_embeddings=True),
    "narrow MLP": dict(mlp_ratio=0.75, mlp_ranks=(5, 0)),
}
RANKS = dict(attn_ranks=(5, 7), mlp_ranks=(0.25, 0.5), lm_head_rank=6)


def random_model(**shape) -> GPT:
    """Every parameter away from where training begins, so that all of them matter."""
    torch.manual_seed(0)
    config = GPTConfig(
        **{**dict(sequence_len=24, vocab_size=61, n_layer=2, n_head=4, n_kv_head=4, n_embd=32), **shape}
    )
    model = GPT(config)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def logits(model):
    idx = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(idx, compute_dtype=model.wte.weight.dtype)


def weights(run, step=6) -> dict:
    return load_checkpoint(metrics.runs_dir() / run, step)[0]["model"]


def run_main(*flags):
    materialize.main([str(flag) for flag in flags])


# ---- the functions


@pytest.mark.parametrize(
    "shape",
    [
        RANKS,
        dict(matrix_ranks={"v": (3, 0), "down": (0, 9)}, n_kv_head=2),
        dict(attn_ranks=(4, 4), tie_embeddings=True),
    ],
)
def test_a_merged_model_has_no_factors_and_the_same_logits(shape):
    """In float64: a random model's own float32 logits are off by 1e-5. A trained model is compared below."""
    model = random_model(**shape).double()
    merged = merge(model)
    config = merged.config
    assert not (config.attn_ranks or config.mlp_ranks or config.matrix_ranks or config.lm_head_rank)
    assert not any(key.endswith((".A", ".B")) for key in merged.state_dict())
    assert (logits(merged) - logits(model)).abs().max() < 1e-12 < logits(model).abs().max()


def test_truncation_is_the_nearest_matrix_in_balanced_factors_and_leaves_the_rest():
    model = random_model(n_kv_head=2)
    cut, kept = truncate(
        model, {"blocks.0.attn.k": lambda S: 4, "blocks.1.mlp.down": lambda S: 9, "lm_head": lambda S: 11}
    )
    for name, r in (("blocks.0.attn.k", 4), ("blocks.1.mlp.down", 9), ("lm_head", 11)):
        W = linear_layers(model)[name].weight.detach().numpy().astype(float)
        layer = linear_layers(cut)[name]
        s = np.linalg.svd(W, compute_uv=False)
        error = np.linalg.norm(W - layer.dense_weight().detach().numpy())
        # Eckart-Young: no matrix of this rank is nearer
        assert error == pytest.approx(np.sqrt((s[r:] ** 2).sum()), rel=1e-4)
        assert kept[name] == pytest.approx((s[:r] ** 2).sum() / (s**2).sum(), rel=1e-6)
        for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B):
            assert np.allclose(gram.detach(), np.diag(s[:r]), atol=1e-4)
    assert cut.config.matrix_ranks == {
        "q": (0, 0),
        "k": (4, 0),
        "v": (0, 0),
        "o": (0, 0),
        "up": (0, 0),
        "down": (0, 9),
    }
    assert cut.config.lm_head_rank == 11 and not cut.config.attn_ranks
    assert torch.equal(cut.blocks[1].attn.q.weight, model.blocks[1].attn.q.weight)
    whole, _ = truncate(model, {name: lambda S: len(S) for name in linear_layers(model)})
    assert torch.equal(logits(whole), logits(model)), "factors with no fewer parameters are not made"


def test_factors_are_truncated_as_the_matrix_that_they_are():
    model = random_model(attn_ranks=(12, 12))
    choose = {name: lambda S: 5 for name in linear_layers(model) if "attn" in name}
    direct = truncate(model, choose)[0]
    via_dense = truncate(merge(model), choose)[0]
    assert direct.config.attn_ranks == (5, 5) and (logits(direct) - logits(via_dense)).abs().max() < 1e-4
    same, kept = truncate(model, {name: lambda S: 12 for name in choose})
    assert not kept and torch.equal(logits(same), logits(model))


def test_energy_by_hand():
    S = torch.tensor([3.0, 2.0, 1.0, 1.0])  # squares 9, 4, 1, 1 of 15
    assert [rank_of_energy(share, S) for share in (0.5, 0.6, 0.61, 0.86, 0.87, 0.94, 0.999)] == [
        1,
        1,
        2,
        2,
        3,
        4,
        4,
    ]
    model = random_model()
    with torch.no_grad():
        model.blocks[0].attn.o.weight.zero_()
    assert not truncate(model, {"blocks.0.attn.o": lambda S: rank_of_energy(0.9, S)})[1], (
        "factors of zeros could never learn"
    )


# ---- the command


def test_merging_a_run_makes_a_whole_run_and_the_same_command_again_is_done(train, capsys, tmp_path):
    low = train("--attn-rank", 4, "--mlp-rank", 0.25, "--lm-head-rank", 8, "--n-kv-head", 1, tag="low")
    command = ("--model-tag", "low", "--out-tag", "dense")
    run_main(*command)
    dense = metrics.load_run(metrics.runs_dir() / "dense")
    assert (
        dense.summary["val/loss"] == pytest.approx(low.summary["val/loss"], abs=1e-5)
        and dense.summary["source/val/loss"] == low.summary["val/loss"]
    )
    assert dense.summary["status"] == "finished" and dense.summary["params/total"] == sum(
        w.numel() for w in weights("dense").values()
    )
    assert all(
        dense.summary[key] == low.summary[key]
        for key in ("step", "total_tokens", "total_training_flops", "total_training_time")
    )
    source = dense.config["derived"]["source"]
    meta = load_checkpoint(metrics.runs_dir() / "low", 6)[1]
    assert (source["tag"], source["step"], source["sha256"]) == ("low", 6, meta["sha256"])
    A, B = (weights("low")[f"blocks.1.mlp.up.{key}"].double() for key in "AB")
    assert torch.equal(weights("dense")["blocks.1.mlp.up.weight"], (B @ A).float())
    of_low, of_dense = (logits(load_model(metrics.runs_dir() / tag, 6)[0]) for tag in ("low", "dense"))
    assert (of_low - of_dense).abs().max() < 1e-5 < of_low.std()
    base_eval.main(["--model-tag", "dense", "--eval-tokens", "1024"])
    assert f"ppl {low.summary['val/ppl']:.3f}" in capsys.readouterr().out
    report.main(["low", "dense", "--out", str(tmp_path / "report")])
    assert "no full-rank run is like it" in (tmp_path / "report/report.md").read_text(), (
        "a merged run is no full-rank control"
    )

    before = (metrics.runs_dir() / "dense/metrics.jsonl").read_bytes()
    capsys.readouterr()
    run_main(*command)
    assert (
        "already made from low" in capsys.readouterr().out
        and before == (metrics.runs_dir() / "dense/metrics.jsonl").read_bytes()
    )
    made = metrics.runs_dir() / "dense/config.json"
    config = json.loads(made.read_text())
    del config["derived"]["source"]["rank_multiple"]  # as before there was the flag
    made.write_text(json.dumps(config))
    run_main(*command)
    assert "already made from low" in capsys.readouterr().out
    with pytest.raises(
        InputError,
        match=r"--out-tag dense: exists and is something else: source.energy \(None there, 0.5 now\)",
    ):
        run_main(*command, "--energy", 0.5)
    with pytest.raises(InputError, match="--out-tag low: exists, and is a training run"):
        run_main("--model-tag", "dense", "--out-tag", "low", "--energy", 0.5)


def test_truncating_a_run_by_ranks_and_by_energy(train, capsys):
    full = train("--num-iterations", 20, "--n-kv-head", 1, tag="full")
    run_main(
        "--model-tag",
        "full",
        "--out-tag",
        "r",
        "--attn-rank",
        0.25,
        "--matrix-ranks",
        "down=6,o=0",
        "--lm-head-rank",
        10,
        "--eval-tokens",
        512,
    )
    run = metrics.load_run(metrics.runs_dir() / "r")
    model = run.config["derived"]["model"]  # q is 32 x 32, k and v are 16 x 32
    assert (
        model["matrix_ranks"]
        == {"q": [8, 8], "k": [4, 4], "v": [4, 4], "o": [0, 0], "up": [0, 0], "down": [6, 6]}
        and model["lm_head_rank"] == 10
    )
    assert weights("r", 20)["blocks.0.mlp.down.A"].shape == (6, 128)
    assert run.config["derived"]["val_tokens"] == 512 and run.summary["source/val/loss"] != pytest.approx(
        full.summary["val/loss"], abs=1e-6
    )
    out = capsys.readouterr().out
    assert f"r                    | 512 validation tokens | loss {run.summary['val/loss']:.4f}" in out
    assert f"{full.summary['params/total']:,} → {run.summary['params/total']:,}" in out

    run_main("--model-tag", "full", "--out-tag", "e", "--energy", 0.6)
    e = metrics.load_run(metrics.runs_dir() / "e")
    W = weights("full", 20)["blocks.1.mlp.up.weight"].numpy().astype(float)
    s = np.linalg.svd(W, compute_uv=False) ** 2
    assert len(weights("e", 20)["blocks.1.mlp.up.A"]) == np.searchsorted(np.cumsum(s) / s.sum(), 0.6) + 1 < 26
    run_main("--model-tag", "e", "--out-tag", "ee", "--energy", 0.3, "--eval-tokens", 0)
    ee = metrics.load_run(metrics.runs_dir() / "ee")
    assert (
        ee.summary["params/total"] < e.summary["params/total"] < full.summary["params/total"]
        and "val/loss" not in ee.summary
    )


def test_what_is_interrupted_does_not_look_finished_and_goes_on(train, monkeypatch):
    train("--attn-rank", 4, tag="low")
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(torch, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        run_main("--model-tag", "low", "--out-tag", "dense")
    assert metrics.load_run(metrics.runs_dir() / "dense").summary["status"] == "running"
    with pytest.raises(InputError, match="no checkpoint"):
        base_eval.main(["--model-tag", "dense"])
    run_main("--model-tag", "low", "--out-tag", "dense")
    assert metrics.load_run(metrics.runs_dir() / "dense").summary["status"] == "finished"


def test_what_cannot_be_done_is_refused_in_one_line(train):
    train("--num-iterations", 1, tag="full")
    train("--num-iterations", 1, "--attn-rank", 4, "--factor-act", "silu", "--tie-embeddings", tag="silu")
    for flags, message in [
        ((), "--out-tag: give"),
        (("--out-tag", "full"), "--out-tag full: is the run itself"),
        (("--out-tag", "x"), "--model-tag full: nothing to merge"),
        (("--out-tag", "x", "--energy", 1), "--energy 1: give a share"),
        (("--out-tag", "x", "--energy", 0.5, "--mlp-rank", 4), "--energy: not with --mlp-rank"),
        (("--energy", 0.5, "--safetensors", "x.safetensors"), "--energy: needs --out-tag"),
        (("--out-tag", "x", "--attn-rank", 33), "--attn-rank.*rank 33 does not fit a 32 x 32 matrix"),
        (("--out-tag", "x", "--attn-rank", 16), "no matrix would have fewer parameters"),
        (("--safetensors", "x.pt"), "--safetensors x.pt: the name has to end"),
        (("--step", 7, "--out-tag", "x", "--energy", 0.5), "no checkpoint of step 7; there are: .1."),
    ]:
        with pytest.raises(InputError, match=message):
            run_main("--model-tag", "full", *flags)
    with pytest.raises(InputError, match="--model-tag silu: blocks.0.attn.q has silu between its factors"):
        run_main("--model-tag", "silu", "--out-tag", "x")
    with pytest.raises(InputError, match="no such run in"):
        run_main("--model-tag", "none", "--out-tag", "x")
    recorded = metrics.runs_dir() / "full/config.json"
    fingerprint = open_corpus(metrics.load_run(recorded.parent).config["flags"]["data"]).fingerprint("val")
    recorded.write_text(recorded.read_text().replace(fingerprint, "0" * 16))
    with pytest.raises(InputError, match="the validation text is no longer the one of the run"):
        run_main("--model-tag", "full", "--out-tag", "x", "--energy", 0.5)
    assert not (metrics.runs_dir() / "x").exists()


# ---- plain PyTorch


@pytest.mark.parametrize(
    "shape",
    [
        *SHAPES.values(),
        RANKS,
        dict(mlp_ranks=(8, 8), attn_ranks=(0, 8), factor_act="silu"),
        dict(layer_map=(1, 0, 0), value_embeddings=True),
        dict(n_layer=3, layer_kinds=("Lv", "Sv", "S")),
    ],
    ids=[*SHAPES, "factored", "silu", "tied layers", "copied layers"],
)
def test_an_exported_model_has_the_same_logits_without_this_package(shape, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(PLAIN.parent))
    plain = import_module("plain_forward")
    model = random_model(**shape)
    save_checkpoint(
        tmp_path / "run",
        3,
        {"model": model.state_dict()},
        {"model": vars(model.config), "tokenizer_hash": "abc"},
    )
    materialize.export(tmp_path / "run", 3, tmp_path / "m.safetensors")
    config, tensors = plain.load(str(tmp_path / "m.safetensors"))
    idx = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (plain.logits(config, tensors, idx) - model(idx)).abs().max() < 1e-5 < model(idx).std()
    assert (
        config["source"]["sha256"]
        == json.loads((tmp_path / "run/checkpoints/step_000003/meta.json").read_text())["sha256"]
    )
    assert config["tokenizer_hash"] == "abc" and config["model"].keys() == vars(GPTConfig()).keys()


def test_the_plain_forward_imports_torch_and_safetensors_alone():
    modules = set()
    for node in ast.walk(ast.parse(PLAIN.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert {"torch", "safetensors"} <= modules <= {"torch", "safetensors"} | sys.stdlib_module_names


def test_export_of_the_new_run_and_of_the_run_as_it_is(train, tmp_path):
    train("--attn-rank", 4, tag="low")
    run_main("--model-tag", "low", "--safetensors", tmp_path / "low.safetensors")
    run_main(
        "--model-tag",
        "low",
        "--out-tag",
        "dense",
        "--eval-tokens",
        0,
        "--safetensors",
        tmp_path / "dense.safetensors",
    )
    exported = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("low", "dense")}
    assert exported["low"]["model"]["attn_ranks"] == [4, 4] and exported["dense"]["model"]["attn_ranks"] == []
    assert exported["low"]["source"]["tag"] == "low" and exported["dense"]["source"]["tag"] == "dense"
