"""Training end to end on a tiny model: learning, exact resume, the run folder, and every refusal."""

import contextlib
import json
import math
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, Killed, losses
from processes import Launched
from test_core_eval import write_bundle

from nanochat import devices, metrics
from nanochat.adapters.loading import load_model
from nanochat.checkpoint_manager import load_checkpoint, saved_steps
from nanochat.errors import InputError
from nanochat.loss_eval import EvalSet, reference_losses
from nanochat.signals import REQUEUE
from scripts import base_eval, base_train

LOW = ("--attn-rank", 4, "--mlp-rank", "0.25")


def final_state(run):
    state, _ = load_checkpoint(metrics.runs_dir() / run.name, run.summary["step"])
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- what a run does


@pytest.mark.parametrize(
    "flags",
    [
        (),
        LOW,
        ("--tie-embeddings", "--value-embeddings", "--n-kv-head", 1),
        ("--lm-head-rank", 8),
        (
            *LOW,
            "--layer-map",
            "mobilellm",
            "--matrix-ranks",
            "v=16,up=0",
            "--factor-act",
            "silu",
            "--recompute",
            "bottleneck",
        ),
    ],
)
def test_a_model_learns_and_the_record_is_complete(train, flags):
    run = train(
        *flags,
        "--num-iterations",
        30,
        "--eval-every",
        10,
        "--sample-every",
        30,
        "--ppl-thresholds",
        "250,100,2",
    )
    s = run.summary
    assert losses(run)[0] == pytest.approx(5.70, abs=0.02)  # ln 300: every token equally likely
    assert s["val/loss"] < 4.0 and s["status"] == "finished" and s["step"] == 30
    assert s["val/ppl"] == pytest.approx(2.718281828 ** s["val/loss"], rel=1e-6)
    assert s["total_tokens"] == 30 * 256 and s["total_training_flops"] == 30 * 256 * s["flops/per_token"]
    assert (
        s["time_to_ppl/250/step"] == 10
        and s["time_to_ppl/100/tokens"] in (2560, 5120, 7680)
        and "time_to_ppl/2/step" not in s
    )
    assert s["params/total"] == sum(
        s[f"params/{g}"] for g in ("embedding", "lm_head", "attention", "mlp", "other")
    )
    for key in (
        "train/lrm",
        "train/dt",
        "train/tok_per_sec",
        "train/grad_norm",
        "train/epoch",
        "val/bpb",
        "mem/peak_bytes",
        "mem/weights_bytes",
        "mem/grads_bytes",
        "mem/optimizer_bytes",
        "total_training_time",
    ):
        assert key in s, key
    assert run.history[-1]["sample"] and [e["step"] for e in run.history] == list(range(1, 31))
    assert (
        run.config["flags"]["depth"] == 2
        and run.config["versions"]["torch"]
        and run.config["device"]["type"] == "cpu"
    )


def test_the_same_seed_gives_the_same_losses_to_the_bit_and_another_seed_does_not(train):
    a = train(tag="a")
    b = train(tag="b")
    c = train("--seed", 1, tag="c")
    assert losses(a) == losses(b) != losses(c) and same(final_state(a), final_state(b))


def test_gradient_accumulation_and_device_batch_change_nothing_but_rounding(train):
    whole = train("--device-batch-size", 8, tag="whole")
    parts = train("--device-batch-size", 1, tag="parts")
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-4)
    assert whole.summary["val/loss"] == pytest.approx(parts.summary["val/loss"], abs=1e-4)


@pytest.mark.parametrize("flags", [(), LOW])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_stopping_after_any_step_and_resuming_is_the_uninterrupted_run_to_the_bit(
    train, kill_after, flags, stop
):
    straight = train(*flags, tag="straight")
    kill_after(stop)
    with pytest.raises(Killed):
        train(*flags, "--save-every", 1, tag="resumed")
    assert saved_steps(metrics.runs_dir() / "resumed") == list(range(1, stop + 1))[-2:], (
        "the newest two are kept"
    )
    kill_after(None)
    resumed = train(*flags, "--save-every", 1, "--resume", "auto", tag="resumed")
    assert losses(resumed) == losses(straight) and same(final_state(resumed), final_state(straight))
    assert resumed.summary["val/loss"] == straight.summary["val/loss"]


def test_on_a_processor_with_bfloat16_a_run_trains_in_it_and_goes_on_in_what_it_began_with(
    train, kill_after, monkeypatch
):
    monkeypatch.delenv("NANOCHAT_DTYPE")
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: True)
    half = train(tag="half")
    single = train("--dtype", "float32", tag="single")
    assert [run.config["device"]["dtype"] for run in (half, single)] == ["bfloat16", "float32"]
    assert losses(half) != losses(single) and half.summary["val/loss"] == pytest.approx(
        single.summary["val/loss"], rel=0.01
    )
    kill_after(4)
    with pytest.raises(Killed):
        train("--save-every", 2, tag="resumed")
    kill_after(None)
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: False)  # as on the next machine
    assert losses(train("--save-every", 2, "--resume", "auto", tag="resumed")) == losses(half)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    assert losses(train(tag="asked")) == losses(single)


def test_resume_from_a_given_step_and_under_nanochats_name(train, kill_after):
    straight = train(tag="straight")
    kill_after(5)
    with pytest.raises(Killed):
        train("--save-every", 2, tag="resumed")
    kill_after(None)
    assert losses(train("--save-every", 2, "--resume-from-step", 2, tag="resumed")) == losses(straight)


def test_stop_at_ppl_ends_the_run_early_and_finished(train):
    run = train("--num-iterations", 40, "--eval-every", 5, "--stop-at-ppl", 150)
    assert run.summary["status"] == "finished" and run.summary["step"] < 40 and run.summary["val/ppl"] <= 150


def test_evaluation_rows_do_not_depend_on_the_batch_and_base_eval_agrees(train, capsys, monkeypatch):
    run = train(tag="a")
    results = {}
    for batch in ("3", "32"):
        (metrics.runs_dir() / "a/eval_000006.json").unlink(missing_ok=True)
        base_eval.main(["--model-tag", "a", "--eval-tokens", "1024", "--device-batch-size", batch])
        results[batch] = json.loads((metrics.runs_dir() / "a/eval_000006.json").read_text())
    for key in ("loss", "ppl", "bpb"):
        assert results["3"][f"val/{key}"] == pytest.approx(run.summary[f"val/{key}"], rel=1e-6)
        assert results["3"][f"val/{key}"] == pytest.approx(results["32"][f"val/{key}"], rel=1e-6)
    capsys.readouterr()
    monkeypatch.setattr(base_eval, "evaluate", lambda *a: pytest.fail("evaluated again"))
    base_eval.main(["--model-tag", "a", "--eval-tokens", "1024"])
    assert f"bpb {run.summary['val/bpb']:.4f}" in capsys.readouterr().out


def test_evaluating_what_is_not_there_is_refused(train):
    train(tag="a")
    with pytest.raises(InputError, match=r"no checkpoint of step 5; there are: \[6\]"):
        base_eval.main(["--model-tag", "a", "--step", "5"])
    with pytest.raises(InputError, match="no such run in"):
        base_eval.main(["--model-tag", "b"])


def test_bits_per_byte_by_hand(train):
    """bpb = nats of all ordinary tokens / ln 2 / their bytes, from logits of one row at a time."""
    import math

    from nanochat.dataloader import Rows
    from nanochat.dataset import open_corpus
    from nanochat.tokenizer import load_tokenizer

    run = train(tag="a")
    folder = metrics.runs_dir() / "a"
    tokenizer = load_tokenizer()
    model, *_ = load_model(folder, 6, "cpu")
    rows = Rows(open_corpus(run.config["flags"]["data"]).val, tokenizer, 32)
    nats = []
    text_nats = 0.0
    text_bytes = 0
    for i in range(1024 // 32):
        row = torch.from_numpy(rows.row(i))
        logp = torch.log_softmax(model(row[None, :-1])[0].double(), dim=-1)
        for position, token in enumerate(row[1:].tolist()):
            nats.append(-logp[position, token].item())
            if token != tokenizer.bos_id:
                text_nats += nats[-1]
                text_bytes += len(tokenizer.tokens[token])
    assert run.summary["val/loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert run.summary["val/bpb"] == pytest.approx(text_nats / math.log(2) / text_bytes, rel=1e-5)


def test_dry_run_prints_the_accounting_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "nothing"))
    base_train.main(
        [
            "--dry-run",
            "--depth",
            "20",
            "--model-dim",
            "1280",
            "--vocab-size",
            "65536",
            "--attn-rank",
            "128",
            "--mlp-rank",
            "128",
        ]
    )
    out = capsys.readouterr().out
    assert "226,755,880" in out and "flops/per_token" in out and "mem/optimizer_bytes" in out
    assert not (tmp_path / "nothing").exists()


def test_budget_of_another_run_is_met_from_below(train, capsys):
    full = train("--num-iterations", 1, tag="full").summary["params/total"]
    rank = train("--num-iterations", 1, "--budget-params", "full", "--solve", "rank", tag="rank")
    assert (
        0.97 * full < rank.summary["params/total"] <= full
        and rank.config["derived"]["model"]["attn_ranks"][0] > 0
    )
    deep = train("--num-iterations", 1, *LOW, "--budget-params", full, "--solve", "depth", tag="deep")
    assert deep.summary["params/total"] <= full and deep.config["derived"]["model"]["n_layer"] > 2


# ---- refusals: one line, exit 2, nothing written


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--attn-rank", 33], r"--attn-rank.*rank 33 does not fit a 32 x 32 matrix.*1 to 32"),
        (["--mlp-rank", 40], r"--mlp-rank.*rank 40 does not fit"),
        (["--attn-rank", -3], r"--attn-rank: '-3': give 0 \(full rank\)"),
        (["--attn-rank", "1.5"], r"--attn-rank: '1.5'"),
        (["--n-kv-head", 1, "--attn-rank", 20], r"rank 20 does not fit a 16 x 32 matrix"),
        (["--lm-head-rank", 33], r"--lm-head-rank.*does not fit a 300 x 32"),
        (
            ["--attn-rank", 8, "--rank-schedule", "linear"],
            r"--rank-schedule linear: needs --rank-end above 0",
        ),
        (
            ["--rank-schedule", "linear", "--rank-end", 4],
            r"--rank-schedule linear: needs --attn-rank or --mlp-rank",
        ),
        (["--attn-rank", 8, "--rank-schedule", "8,0"], r"--rank-schedule 8,0: give 2 ranks above 0"),
        (["--attn-rank", 8, "--rank-schedule", "8,4,2"], r"give 2 ranks above 0, one a layer"),
        (["--attn-rank", 8, "--rank-schedule", "wavy"], r"--rank-schedule wavy: use one of constant, linear"),
        (
            ["--attn-rank", 8, "--rank-schedule", "linear", "--rank-end", 0.5],
            r"--rank-end 0.5: .* both as ranks or both as fractions",
        ),
        (
            ["--matrix-ranks", "w=3"],
            r"--matrix-ranks: 'w=3': no matrix is called w; write e.g. v=128,down=0.5, of q, k, v, o, up, "
            "down",
        ),
        (["--matrix-ranks", "v=33"], r"--matrix-ranks: v \(layer 0\): rank 33 does not fit a 32 x 32 matrix"),
        (
            ["--matrix-ranks", "v=8/4/2"],
            r"--matrix-ranks v=8/4/2: gives v 3 ranks; give one, or 2, one a layer",
        ),
        (
            ["--matrix-ranks", "v=8/4", "--budget-params", "99999", "--solve", "depth"],
            r"--solve depth: --matrix-ranks v=8/4 has one rank a layer",
        ),
        (
            ["--matrix-ranks", "v=8,v=4"],
            r"--matrix-ranks: 'v=8,v=4': gives v more than once; one rank a layer is written v=64/64/128",
        ),
        (["--rank-multiple", 0], r"--rank-multiple: '0': give -1 \(automatic\), 1 \(fractions as given\)"),
        (["--layer-map", "0,1,2"], r"--layer-map 0,1,2: there is no layer 2, the layers are 0 to 1$"),
        (
            ["--layer-map", "1,1"],
            r"--layer-map 1,1: leaves out layer 0 of --depth 2, which would never learn",
        ),
        (["--layer-map", "thrice"], r"--layer-map: 'thrice': give the layer at each position"),
        (["--layer-map", "goliath"], r"--layer-map goliath: takes copies from two trained checkpoints"),
        (["--layer-map", "A:0,B:1"], r"--layer-map A:0,B:1: takes copies from two trained checkpoints"),
        (
            ["--layer-map", "0,1", "--budget-params", "99999", "--solve", "depth"],
            r"--solve depth: --layer-map 0,1 names the layers",
        ),
        (
            ["--head-dim", 24],
            r"--head-dim 24: must divide the width 32; e.g. --model-dim 24 or 48",
        ),
        (["--head-dim", 7], r"--head-dim 7: must be even; e.g. --head-dim 8"),
        (
            ["--mlp-ratio", 0.01],
            r"--mlp-ratio 0.01: leaves the MLP no hidden layer at width 32; give more, e.g. 4",
        ),
        (
            ["--mlp-ratio", 0.5, "--mlp-rank", 17],
            r"--mlp-rank.*rank 17 does not fit a 16 x 32 matrix: give 0 \(full\), 1 to 16",
        ),
        (["--n-kv-head", 3], r"--n-kv-head 3: must divide the 2 heads"),
        (["--window-pattern", "SX"], r"--window-pattern 'SX'"),
        (["--total-batch-size", 300], r"--total-batch-size 300: .*= 32; nearest: 288 or 320"),
        (["--total-batch-size", 100], r"--total-batch-size 100: .*nearest: 96 or 128$"),
        (["--vocab-size", 4096], r"--vocab-size 4096: .*tokenizer.json has 300"),
        (["--data", "nonesuch"], r"--data nonesuch: .*stdlib.*climbmix"),
        (["--device-type", "cuda"], r"--device-type cuda: no CUDA device"),
        (["--fp8", "--device-type", "cpu"], r"^--fp8: a processor does not multiply float8; train on an L4"),
        (
            ["--max-seq-len", 100_000, "--device-batch-size", 1, "--total-batch-size", 100_000],
            r"too little training text for one row of 100000",
        ),
        (["--eval-tokens", 8], r"--eval-tokens 8: less than one row"),
        (["--num-iterations", "many"], r"--num-iterations: 'many' is not a whole number"),
        (["--matrix-lr", "nan"], r"--matrix-lr: 'nan' is not a number"),
        (["--ppl-thresholds", "100,-3"], r"--ppl-thresholds: '100,-3'"),
        (["--resume", 4], r"--resume 4: there is no run bad"),
        (["--resume", "latest"], r"--resume latest: use auto"),
        (["--budget-params", "10", "--solve", "rank"], r"--budget-params 10: even rank 1"),
        (["--budget-params", "99999999"], r"--budget-params and --solve go together"),
        (["--dept", 4], r"unrecognized arguments: --dept 4"),
    ],
)
def test_bad_flags_are_refused_in_one_line(train, base_dir, flags, message):
    if flags[0] == "--device-type" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(InputError, match=message) as e:
        train(*flags, tag="bad")
    assert "\n" not in str(e.value) and not (base_dir / "runs/bad").exists()


def test_text_too_short_for_validation_is_refused(train, tmp_path):
    folder = tmp_path / "short"
    folder.mkdir()
    (folder / "train.txt").write_text("the cat sees the dog " * 200)
    (folder / "val.txt").write_text("the cat")
    with pytest.raises(InputError, match="too little validation text"):
        train("--data", folder)


def test_a_tag_with_another_config_is_refused_naming_what_differs(train):
    train(tag="a")
    with pytest.raises(
        InputError,
        match=r"--model-tag a: exists with another config: .*flags.matrix_lr \(-1 there, 0.03 now\)",
    ):
        train("--matrix-lr", 0.03, tag="a")


def test_a_finished_run_is_not_run_again_and_not_touched(train, capsys):
    folder = metrics.runs_dir() / train(tag="a").name
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    train(tag="a")
    assert "already finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_an_unfinished_run_with_checkpoints_is_refused_with_the_way_on(train, kill_after):
    kill_after(4)
    with pytest.raises(Killed):
        train("--save-every", 2)
    kill_after(None)
    with pytest.raises(
        InputError, match=r"has checkpoints \[2, 4\] and is not finished; continue it with --resume auto"
    ):
        train("--save-every", 2)


def spoiled(monkeypatch, bad_calls, spoil):
    """base_train.gradient_norm, called once a step, preceded by spoil(model) in the given calls (from 1)."""
    original = base_train.gradient_norm
    calls = [0]

    def gradient_norm(trainable, clip):
        calls[0] += 1
        if calls[0] in bad_calls:
            spoil(trainable.model)
        return original(trainable, clip)

    monkeypatch.setattr(base_train, "gradient_norm", gradient_norm)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_not_applied_and_counted(train, monkeypatch, value):
    spoiled(monkeypatch, {2, 5}, lambda model: model.resid_lambdas.grad.fill_(value))
    run = train("--max-bad-steps", 1)
    assert [("train/loss" in e, e.get("train/bad_steps")) for e in run.history] == [
        (True, None),
        (False, 1),
        (True, None),
        (True, None),
        (False, 2),
        (True, None),
    ]
    assert (
        run.summary["status"] == "finished"
        and run.summary["train/bad_steps"] == 2
        and run.summary["val/loss"] < 5.7
    )
    state = final_state(run)
    assert all(torch.isfinite(t).all() for t in state["model"].values())
    assert state["optimizer"]["smear"]["step"] == 4


def test_too_many_steps_in_a_row_that_are_not_finite_stop_the_run_with_its_last_good_weights(
    train, monkeypatch
):
    good = train("--num-iterations", 3, "--warmdown-ratio", 0, "--matrix-lr", 0.04, tag="good")
    spoiled(monkeypatch, {4, 5, 6}, lambda model: model.wte.weight.grad.fill_(float("nan")))
    with pytest.raises(
        InputError,
        match=r"step 6: loss or gradient not finite in 3 steps in a row .*runs/tiny/checkpoints: \[6\]; "
        "lower the learning rates",
    ):
        train("--max-bad-steps", 2, "--num-iterations", 9, "--warmdown-ratio", 0, "--matrix-lr", 0.04)
    state, meta = load_checkpoint(metrics.runs_dir() / "tiny", 6)
    assert same(state["model"], final_state(good)["model"]) and meta["bad_steps"] == 3
    monkeypatch.undo()


@pytest.mark.parametrize(
    "flags,step,saved", [(["--save-every", 2, "--keep", 1], 4, r"\[2\]"), (["--max-bad-steps", 1], 5, "none")]
)
def test_weights_that_are_not_finite_take_no_checkpoints_place(train, monkeypatch, flags, step, saved):
    """An update may overflow that came of a finite gradient: here the third."""
    original = base_train.update
    calls = [0]

    def overflowing(trainable, *rest):
        original(trainable, *rest)
        calls[0] += 1
        if calls[0] == 3:
            trainable.optimizers[-1].param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(base_train, "update", overflowing)
    with pytest.raises(
        InputError,
        match=rf"step {step}: model\.blocks.* not finite; nothing was saved; "
        rf"the last good weights are in .*checkpoints: {saved}; lower",
    ):
        train("--num-iterations", 9, *flags)
    assert saved_steps(metrics.runs_dir() / "tiny") == ([] if saved == "none" else [2])


@pytest.mark.parametrize("in_step,saved", [(2, 3), (3, 3), (6, 6)])
def test_asked_to_stop_it_finishes_the_step_saves_and_goes_on_to_the_same_weights(
    train, monkeypatch, in_step, saved
):
    """A request during step 2 is agreed on with the losses of step 3. The evaluation of steps 3 and 6
    hears it, and is put off.
    """
    straight = train(tag="straight")
    original = base_train.gradient_norm
    steps = []

    def signalled(trainable, clip):
        steps.append(1)
        if len(steps) == in_step:
            signal.raise_signal(signal.SIGUSR1)
        return original(trainable, clip)

    monkeypatch.setattr(base_train, "gradient_norm", signalled)
    folder = metrics.runs_dir() / "stopped"
    with pytest.raises(SystemExit) as e:
        train(tag="stopped")
    assert e.value.code == REQUEUE == 75
    stopped = metrics.load_run(folder)
    assert stopped.summary["status"] == "stopped" and saved_steps(folder) == [saved]
    assert "val/loss" not in stopped.history[-1]
    resumed = train("--resume", "auto", tag="stopped")
    assert losses(resumed) == losses(straight) and same(final_state(resumed), final_state(straight))
    assert evaluations(resumed) == evaluations(straight) and resumed.summary["status"] == "finished"
    assert (
        resumed.summary["val/loss"] == straight.summary["val/loss"]
        and "evaluation_owed" not in load_checkpoint(folder, 6)[1]
    )


class Once(threading.Event):
    """A request to stop that comes with the n-th look at it."""

    number = signal.SIGTERM

    def __init__(self, n):
        super().__init__()
        self.left = n

    def is_set(self):
        self.left -= 1
        return self.left < 0


def test_wherever_a_request_falls_the_resumed_run_is_the_uninterrupted_one(train, monkeypatch, tmp_path):
    """In micro-steps, evaluation, CORE, samples and saves: stopped again and again, each time after more
    looks at the request.
    """
    flags = [
        "--sample-every",
        2,
        "--save-every",
        2,
        "--eval-every",
        2,
        "--stop-at-ppl",
        20,
        "--core-metric-every",
        3,
        "--core-dir",
        write_bundle(tmp_path / "bundle"),
    ]
    straight = train(*flags, tag="straight")
    monkeypatch.setattr(base_train, "STOP_PATIENCE", -1.0)  # every step is long enough to be broken off
    stops = 0
    ended = False
    while not ended:
        monkeypatch.setattr(
            base_train.signals, "stop_signals", lambda: contextlib.nullcontext(Once(13 * stops))
        )
        try:
            resumed = train(*flags, "--resume", "auto", tag="stopped")
            ended = True
        except SystemExit as e:
            assert (
                e.code == REQUEUE
                and metrics.load_run(metrics.runs_dir() / "stopped").summary["status"] == "stopped"
            )
            stops += 1
    assert (
        stops > 5
        and losses(resumed) == losses(straight)
        and same(final_state(resumed), final_state(straight))
    )
    assert (
        evaluations(resumed) == evaluations(straight) and resumed.summary["step"] == straight.summary["step"]
    )


def evaluations(run) -> list[dict]:
    """What was measured at each step, without what depends on the clock."""
    keys = ("step", "val/loss", "val/ppl", "val/bpb", "core_metric", "centered_results/choice", "sample")
    values = []
    for entry in run.history:
        values.append({key: entry[key] for key in keys if key in entry})
    return values


def test_a_tag_in_use_is_refused_with_pid_and_host_and_a_dead_holder_is_no_hindrance(train, monkeypatch):
    lock = metrics.runs_dir().parent / "locks/tiny.lock"
    code = (
        "import time; from nanochat.common import claimed; from pathlib import Path\n"
        f"with claimed(Path({str(lock)!r}), 'x'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(
        InputError,
        match=f"--model-tag tiny: .*/runs/tiny is in use by process {holder.pid} on {socket.gethostname()}",
    ):
        train()
    holder.kill()
    holder.wait()
    assert train().summary["status"] == "finished"


@pytest.mark.parametrize("keep,kept", [(1, [6]), (3, [4, 5, 6]), (-1, [1, 2, 3, 4, 5, 6])])
def test_the_newest_checkpoints_are_kept(train, keep, kept):
    train("--save-every", 1, "--keep", keep)
    assert saved_steps(metrics.runs_dir() / "tiny") == kept


def test_the_command_prints_one_line_and_exits_with_2(base_dir, command):
    code, _, stderr = command("scripts/base_train.py", *TINY, "--attn-rank", "99")
    assert code == 2 and stderr.count("\n") == 1
    assert stderr.startswith("error: --attn-rank (layer 0): rank 99 does not fit a 32 x 32 matrix")


def test_a_folder_that_cannot_be_written_is_one_line(base_dir, corpus_dir, command):
    (base_dir / "runs").write_text("a file where the folder should be")
    code, _, stderr = command("scripts/base_train.py", *TINY, "--data", corpus_dir)
    assert code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1 and "runs" in stderr


def trained_without_the_compiler(*flags):
    base_train.main(list(flags))
    assert "torch._dynamo" not in sys.modules


def test_a_run_that_is_not_compiled_does_not_load_the_compiler(base_dir, corpus_dir, tmp_path):
    """It would take 1.4 s of the start and 71 MB of every process."""
    flags = [*TINY, "--data", str(corpus_dir), "--sample-every", "3", "--grad-clip", "1.0", "--mlp-rank", "4"]
    assert Launched(1, tmp_path / "output", trained_without_the_compiler, *flags).codes() == [0], (
        tmp_path / "output"
    ).read_text()[-2000:]


def test_reference_losses_are_those_of_the_uniform_and_the_unigram_guess():
    def rows(*slots):
        # row 0 begins with BOS, which is not asked
        return SimpleNamespace(T=2, count=len(slots), row=lambda i: np.array((0, *slots[i])))

    eval_set = EvalSet(rows((1, 2), (2, 3), (0, 0)), 2, SimpleNamespace(token_bytes=list))
    found = reference_losses(rows((1, 1), (1, 2)), eval_set, vocab_size=4)
    # seen 0, 3, 1, 0 times and once more each, of 8; asked 1, 2, 2, 3
    assert found == pytest.approx(
        {"uniform": math.log(4), "unigram": -(math.log(4 / 8) + 2 * math.log(2 / 8) + math.log(1 / 8)) / 4}
    )
