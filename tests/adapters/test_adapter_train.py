"""Adapters trained on a finished run: the record, exact resume, layers repeated, loading, merging, errors."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, Killed
from test_base_train import final_state, same

from nanochat import metrics
from nanochat.accounting import account, on_meta
from nanochat.adapters.adalora import orthogonality
from nanochat.adapters.attach import adapters_of
from nanochat.adapters.loading import ADAPTER, load_model
from nanochat.checkpoint_manager import amend_checkpoint, load_checkpoint, saved_steps
from nanochat.engine import next_logits, prefill
from nanochat.errors import InputError
from nanochat.gpt import GPTConfig
from nanochat.layer_maps import stacked, with_layer_map
from nanochat.optim import default_matrix_lr
from nanochat.run_files import write_meta
from nanochat.sweep.trial import resolve_adapted
from scripts import adapter_train, base_eval, base_train, generate, layer_map_eval, materialize, tok_train

HORIZON = [
    "--device-batch-size",
    "4",
    "--total-batch-size",
    "256",
    "--num-iterations",
    "6",
    "--eval-tokens",
    "1024",
    "--sample-every",
    "-1",
]
L = 2  # of the base: layers, width, vocabulary
C = 32
V = 300


@pytest.fixture(scope="module")
def world(tmp_path_factory, corpus_dir):
    """A base dir with a finished run `base`, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        tok_train.main(["--data", str(corpus_dir), "--vocab-size", str(V)])
        base_train.main(
            [
                *TINY,
                "--data",
                str(corpus_dir),
                "--num-iterations",
                "12",
                "--window-pattern",
                "SL",
                "--value-embeddings",
                "--model-tag",
                "base",
            ]
        )
    return folder


@pytest.fixture
def adapt(world, monkeypatch):
    """adapt('--flag', value, …, tag='name') -> the finished Run of an adapter on `base`."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))

    def run(*flags, tag):
        adapter_train.main([*HORIZON, "--model-tag", "base", "--run-tag", tag, *map(str, flags)])
        return metrics.load_run(metrics.runs_dir() / tag)

    return run


def files(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(run) -> list[float]:
    return [entry["train/loss"] for entry in run.history if "train/loss" in entry]


def logits(model):
    with torch.no_grad():
        return model(torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(0)))


def loaded(tag: str):
    return load_model(metrics.runs_dir() / tag, saved_steps(metrics.runs_dir() / tag)[-1])[0]


# ---- training

LORA = ("--rank", 4, "--eval-every", 3)
TIED = ("--layer-map", "0,1,0,1,1", "--rank", 2)
WHOLE = ("--adapter", "none", "--lr", 0.1, "--weight-decay", 0.01)
ADALORA = (
    "--adapter",
    "adalora",
    "--rank",
    2,
    "--dropout",
    0.2,
    "--adalora-warmup",
    0.2,
    "--adalora-every",
    2,
    "--num-iterations",
    10,
    "--lr",
    0.01,
)


def test_a_run_starts_at_the_base_learns_and_leaves_it_alone(adapt, world):
    before = files(world / "runs/base")
    run = adapt(*LORA, tag="lora")
    base = metrics.load_run(world / "runs/base")
    s = run.summary
    start, *rest = run.history
    assert start["step"] == 0 and start["val/loss"] == base.summary["val/loss"] and "train/loss" not in start
    assert (
        [entry["step"] for entry in rest] == [1, 2, 3, 4, 5, 6]
        and s["val/loss"] < start["val/loss"] - 0.01
        and s["status"] == "finished"
    )
    assert files(world / "runs/base") == before
    trained = L * 4 * (4 * (C + C) + 2 * (C + 4 * C))
    assert (
        s["params/trained"] == trained
        and s["params/stored_bits"] == 32 * trained
        and s["params/total"] == base.summary["params/total"] + trained
    )
    assert s["mem/grads_bytes"] == 4 * trained and s["mem/optimizer_bytes"] < 8 * trained + 200
    state = final_state(run)
    assert (
        set(state) == {"adapter", "optimizer"}
        and sum(t.numel() for t in state["adapter"].values()) == trained
    )
    assert (
        run.config["derived"]["origin"]["bases"][0]["tag"] == "base"
        and run.config["derived"]["tokenizer_hash"] == base.config["derived"]["tokenizer_hash"]
    )


@pytest.mark.parametrize("stop", [3, 6])
def test_resuming_within_adaloras_schedule_with_dropout_is_the_uninterrupted_run_to_the_bit(
    adapt, kill_after, stop
):
    straight = adapt(*ADALORA, tag="straight")  # of both cases the same; the second time only read
    kill_after(stop)
    with pytest.raises(Killed):
        adapt(*ADALORA, "--save-every", 1, tag=f"resumed{stop}")
    kill_after(None)
    resumed = adapt(*ADALORA, "--save-every", 1, "--resume", "auto", tag=f"resumed{stop}")
    assert losses(resumed)[-1] == losses(straight)[-1] and same(final_state(resumed), final_state(straight))
    ranks = straight.summary["adalora/ranks"]
    assert (
        ranks == resumed.summary["adalora/ranks"]
        and sum(ranks.values()) == 2 * 6 * L
        and len(set(ranks.values())) > 1
    )


def test_the_orthogonality_of_adalora_is_in_the_gradient_and_not_in_the_loss(adapt):
    flags = (
        "--adapter",
        "adalora",
        "--rank",
        2,
        "--num-iterations",
        2,
        "--adalora-warmup",
        0,
        "--adalora-final",
        0,
    )
    with_it = adapt(*flags, tag="orthogonal")
    without = adapt(*flags, "--adalora-orthogonality", 0, tag="free")
    assert losses(with_it)[0] == losses(without)[0]
    left = [orthogonality(adapters_of(loaded(run.name), ADAPTER)).item() for run in (with_it, without)]
    assert left[0] < 0.98 * left[1]


def test_adapters_of_all_sizes_on_bases_of_all_ranks_take_one_horizon(adapt, world, corpus_dir, capsys):
    """Also where positions share their layer's weights or copy them; the plan of a sweep is the script's."""
    low = ["--attn-rank", "4", "--model-tag", "low_base"]
    base_train.main([*TINY, "--data", str(corpus_dir), "--num-iterations", "1", *low])
    derived = [
        "--device-batch-size",
        "4",
        "--total-batch-size",
        "-1",
        "--num-iterations",
        "-1",
        "--target-param-data-ratio",
        "2000",
    ]
    names = ["--model-tag", "base", "--run-tag", "new"]

    def training_line(*flags):
        capsys.readouterr()
        adapter_train.main([*names, *derived, "--dry-run", *map(str, flags)])
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("training: "))
        return line.partition(", lr")[0]

    usual = training_line()
    layers = ("--layer-map", "0,1,1")
    of_low = ("--model-tag", "low_base")
    for flags in (("--rank", 2), of_low, ("--adapter", "none"), layers, (*layers, "--copied")):
        assert training_line(*flags) == usual
    assert training_line(*of_low, "--horizon-from", "own") != usual
    of_base = (*TINY, "--vocab-size", str(V), "--attn-rank", "4")
    plan = resolve_adapted("adapter_train", (*names, *derived), of_base, 1)[2]
    assert f" {plan['num_iterations']:,} steps × {plan['total_batch_size']:,} tokens " in usual


def test_the_whole_model_is_trained_at_a_fraction_of_base_trains_rates(adapt, world):
    run = adapt(*WHOLE, tag="whole")
    base = metrics.load_run(world / "runs/base")
    assert run.history[0]["val/loss"] == base.summary["val/loss"] > run.summary["val/loss"]
    assert run.summary["params/trained"] == run.summary["params/total"] == base.summary["params/total"]
    assert logits(loaded("whole")).shape == (2, 20, V)
    args = adapter_train.parse(["--model-tag", "base", "--run-tag", "x", "--adapter", "none", "--lr", "0.5"])
    assert asdict(adapter_train.rates(args, 100)) == pytest.approx(
        dict(
            embedding_lr=0.15,
            unembedding_lr=0.002,
            matrix_lr=0.5 * default_matrix_lr(100),
            scalar_lr=0.05,
            weight_decay=0,
        )
    )


# ---- layers executed more than once


def test_tied_and_copied_positions_learn_the_same_and_differ_in_memory_alone(adapt, world):
    tied = adapt(*TIED, tag="tied")
    copied = adapt(*TIED, "--copied", tag="copied")
    base = metrics.load_run(world / "runs/base").summary
    assert losses(tied) == losses(copied) and same(final_state(tied), final_state(copied))
    assert torch.equal(logits(loaded("tied")), logits(loaded("copied")))
    assert (
        tied.summary["params/trained"]
        == copied.summary["params/trained"]
        == 5 * 2 * (4 * (C + C) + 2 * (C + 4 * C))
    ), "an adapter for each position"
    assert tied.summary["params/total"] == base["params/total"] + 6 + tied.summary["params/trained"], (
        "three positions more, with two scalars each"
    )
    assert copied.summary["params/total"] > tied.summary["params/total"] + 3 * 12 * C * C
    assert tied.summary["flops/per_token"] == copied.summary["flops/per_token"]
    whole = adapt("--adapter", "none", *TIED[:2], tag="whole_tied")
    assert whole.history[0]["val/loss"] == tied.history[0]["val/loss"] and loaded(
        "whole_tied"
    ).config.layer_map == [0, 1, 0, 1, 1]


def test_stacked_layers_are_the_mapped_model_and_their_gradients_add_up(adapt, world):
    base = loaded("base")
    idx = torch.randint(0, V, (2, 33), generator=torch.Generator().manual_seed(1))
    layers = (0, 0, 1, 0)
    gradients = []
    for model in (with_layer_map(base, layers), stacked(base, layers=layers)):
        model.zero_grad()
        assert torch.equal(logits(model), logits(with_layer_map(base, layers)))
        model(idx[:, :-1], idx[:, 1:]).backward()
        gradients.append(model.blocks[0].mlp.up.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert stacked(base) is base
    tied = with_layer_map(base, layers)
    again = stacked(tied)
    assert (
        again.config.n_layer == 4
        and account(again)["params/total"]
        == account(tied)["params/total"]
        < account(stacked(tied, tied=False))["params/total"]
    )


def test_layers_of_two_runs_are_copied_and_both_are_asked_for_again(adapt, world):
    adapt(*WHOLE, tag="whole")
    run = adapt("--layer-map", "A:0,B:0,B:1", "--second-tag", "whole", "--copied", "--rank", 2, tag="two")
    assert [base["tag"] for base in run.config["derived"]["origin"]["bases"]] == ["base", "whole"]
    model = loaded("two")
    second = loaded("whole")
    assert torch.equal(model.blocks[2].mlp.up.base.weight, second.blocks[1].mlp.up.weight)
    assert not torch.equal(model.blocks[0].mlp.up.base.weight, model.blocks[1].mlp.up.base.weight)


def test_cached_decoding_of_an_adapted_stack_is_the_full_forward_pass(adapt):
    adapt(*TIED, tag="tied")
    model = loaded("tied")
    tokens = torch.randint(0, V, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        read, cache = prefill(model, tokens[:, :15].tolist(), 20, torch.float32)
        steps = [read] + [
            next_logits(model, tokens[:, i : i + 1], torch.float32, cache) for i in range(15, 20)
        ]
        torch.testing.assert_close(torch.stack(steps, 1), model(tokens)[:, 14:], atol=1e-4, rtol=1e-4)


# ---- what it costs


def test_flops_are_those_of_what_is_passed_back_and_trained():
    args = adapter_train.parse(
        ["--model-tag", "a", "--run-tag", "b", "--targets", r"blocks\.1\.attn\.q", "--rank", "4"]
    )
    config = GPTConfig(
        sequence_len=16, vocab_size=50, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"
    )
    costs = account(adapter_train.adapt(args, (), on_meta(config)))
    whole = account(config)
    matrices = 12 * 32 * 32
    scores = 32 * 16
    adapter = 4 * (32 + 32)
    assert (
        whole["flops/per_token"] == 3 * (6 * matrices + 12 * scores) + 6 * 32 * 50
        and whole["params/trained"] == whole["params/total"]
    )
    forward_only = 2 * matrices + 4 * scores
    passed_back = 4 * matrices + 12 * scores
    assert costs["flops/per_token"] == forward_only + 2 * passed_back + 6 * adapter + 4 * 32 * 50
    assert (
        costs["params/trained"] == adapter
        and costs["mem/optimizer_bytes"] == 8 * adapter
        and costs["mem/grads_bytes"] == 4 * adapter
    )


# ---- use


def test_other_scripts_take_it_as_any_run(adapt, capsys):
    run = adapt(*TIED, tag="tied")
    base_eval.main(["--model-tag", "tied", "--eval-tokens", "1024"])
    found = json.loads((metrics.runs_dir() / "tied/eval_000006.json").read_text())
    assert found["val/loss"] == pytest.approx(run.summary["val/loss"], rel=1e-6) and found["sample"]
    generate.main(["--model-tag", "tied", "-p", "the cat", "--max-tokens", "4"])
    assert capsys.readouterr().out.rstrip().rpartition("\n")[2].startswith("the cat")
    layer_map_eval.main(["--model-tag", "tied", "--maps", "0,1,2,3,4,4", "--eval-tokens", "1024"])
    assert f"ppl {run.summary['val/ppl']:12.3f}" in capsys.readouterr().out


def test_merged_it_is_a_plain_model_that_trains_on(adapt, corpus_dir, capsys):
    run = adapt(*TIED, tag="tied")
    materialize.main(["--model-tag", "tied", "--out-tag", "merged"])
    out = capsys.readouterr().out
    assert (
        "lora on base: inside 30 matrices" in out
        and "now each of the 5 positions has a copy" in out
        and out.count("ppl") == 2
    )
    merged = metrics.load_run(metrics.runs_dir() / "merged")
    assert merged.summary["source/val/loss"] == pytest.approx(run.summary["val/loss"], rel=1e-6)
    assert merged.summary["val/loss"] == pytest.approx(run.summary["val/loss"], rel=1e-5)
    torch.testing.assert_close(logits(loaded("merged")), logits(loaded("tied")), atol=1e-5, rtol=1e-5)
    base_train.main(
        [
            *TINY[TINY.index("--device-batch-size") :],
            "--num-iterations",
            "1",
            "--data",
            str(corpus_dir),
            "--init-from",
            "merged",
            "--model-tag",
            "on",
        ]
    )
    assert metrics.load_run(metrics.runs_dir() / "on").config["derived"]["model"]["n_layer"] == 5
    materialize.main(["--model-tag", "tied", "--out-tag", "cut", "--energy", "0.5", "--eval-tokens", "0"])
    assert (
        metrics.load_run(metrics.runs_dir() / "cut").summary["params/total"] < merged.summary["params/total"]
    )


# ---- refusals


def refused(flags, message, tag="refused"):
    with pytest.raises(InputError, match=message):
        adapter_train.main([*HORIZON, "--model-tag", "base", "--run-tag", tag, *map(str, flags)])
    assert not (metrics.runs_dir() / tag / "config.json").exists() or tag != "refused"


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--model-tag", "absent"), "--model-tag absent: no such run"),
        (("--step", 5), "--model-tag base: no checkpoint of step 5"),
        (("--run-tag", "base"), "--run-tag base: is the base itself"),
        (("--layer-map", "0,2"), "--layer-map 0,2: there is no layer 2, the layers are 0 to 1"),
        (("--layer-map", "0,0", "--adapter", "none"), "leaves out layer 1"),
        (
            ("--layer-map", "A:0,B:1", "--copied"),
            "--layer-map A:0,B:1: takes layers of a second run; name it with --second-tag",
        ),
        (("--layer-map", "A:0,B:1", "--second-tag", "b"), "are copied; give --copied"),
        (("--layer-map", "0,1", "--second-tag", "b"), "--second-tag b: no map takes its layers"),
        (("--layer-map", "A:0,B:1", "--second-tag", "b", "--copied"), "--second-tag b: no such run"),
        (("--targets", r"attn\.[xyz]$"), r"no matrix has such a name; the nearest are blocks\.0\.attn\.q"),
        (("--rank", 33), r"rank 33: blocks\.0\.attn\.q is 32 x 32; give 1 to 32"),
        (("--ranks", "attn"), "write PATTERN=N"),
        (("--ranks", "attn=0"), "not a whole number >= 1"),
        (("--adapter", "adalora", "--adalora-initial", 0.5), "below 1 the budget would rise"),
        (
            ("--adapter", "adalora", "--adalora-warmup", 0.5, "--adalora-final", 0.5),
            "together have to be below 1",
        ),
        (("--adapter", "adalora", "--num-iterations", 1, "--adalora-final", 0.6), "do not fit into 1 steps"),
        (("--dropout", 1), "dropout 1"),
        (("--alpha", 0), "alpha 0"),
        (("--resume", "auto", "--eval-tokens", 3), "--eval-tokens 3: less than one row"),
        (("--total-batch-size", 100), "nearest: 96 or 128"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(adapt, flags, message):
    refused(flags, message)


def test_unfinished_bases_adapters_and_changed_flags_are_refused(adapt, world):
    adapt(*LORA, tag="lora")
    refused(
        ("--model-tag", "lora"),
        "--model-tag lora: is an adapter on base; make a plain model of it first: "
        "python -m scripts.materialize",
    )
    refused(
        ("--rank", 2),
        r"--run-tag lora: exists with another config: .*flags\.rank \(4 there, 2 now\)",
        tag="lora",
    )
    with pytest.raises(InputError, match="--init-from lora:6: is an adapter"):
        base_train.main(["--init-from", "lora", "--device-batch-size", "4"])
    with pytest.raises(InputError, match="lora is an adapter; give --out-tag too"):
        materialize.main(["--model-tag", "lora", "--safetensors", str(world / "x.safetensors")])
    base_train.main(
        [
            *TINY,
            "--data",
            metrics.load_run(world / "runs/base").config["flags"]["data"],
            "--num-iterations",
            "1",
            "--subspace",
            "none",
            "--model-tag",
            "few",
        ]
    )
    refused(
        ("--model-tag", "few"), "--model-tag few: its matrices are made of a few numbers .--subspace none."
    )
    shutil.copytree(world / "runs/base", world / "runs/half")
    (world / "runs/half/summary.json").write_text('{"status": "stopped"}')
    amend_checkpoint(world / "runs/half", 12, {"last": None})
    refused(("--model-tag", "half"), "--model-tag half: is not finished")


def test_an_adapter_does_not_load_onto_another_base(adapt, world, tmp_path, monkeypatch):
    adapt(*LORA, tag="lora")
    adapt(*WHOLE, tag="whole")
    shutil.copytree(world / "runs/lora", tmp_path / "runs/lora")
    shutil.copytree(world / "runs/whole", tmp_path / "runs/base")
    checkpoints = tmp_path / "runs/base/checkpoints"
    saved = (checkpoints / "step_000006").rename(checkpoints / "step_000012")
    write_meta(saved, {**json.loads((saved / "meta.json").read_text()), "step": 12})
    with pytest.raises(InputError, match="base: step 12 is another base than the adapter was trained on"):
        load_model(tmp_path / "runs/lora", 6)
    shutil.rmtree(tmp_path / "runs/base")
    with pytest.raises(InputError, match="runs/base"):
        load_model(tmp_path / "runs/lora", 6)
    _, meta = load_checkpoint(world / "runs/lora", 6)
    assert (
        meta["adapter"]["origin"]["bases"][0]["sha256"]
        == load_checkpoint(world / "runs/base", 12)[1]["sha256"]
    )
