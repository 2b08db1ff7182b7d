"""The inference bench: what it counts, and what it writes; nothing depends on the machine's speed."""

import json
import shlex
import statistics

import pytest
import torch

from nanochat.accounting import count_parameters
from nanochat.engine import next_logits, prefill
from nanochat.errors import InputError
from nanochat.gpt import GPTConfig
from nanochat.report.infer_bench_page import verdict, verdicts
from scripts import infer_bench
from scripts.infer_bench import make_forms, make_passes, peak_bytes, random_model

CPU = torch.device("cpu")
SMALL = dict(sequence_len=32, vocab_size=60, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


def small(**changes):
    torch.manual_seed(0)
    return random_model(GPTConfig(**{**SMALL, **changes}), CPU)


def shapes(model) -> dict:
    return {name: p.shape for name, p in model.named_parameters()}


def test_the_forms_of_a_model():
    idx = torch.arange(8)[None]
    low = small(attn_ranks=(4, 4), mlp_ranks=(8, 8), matrix_ranks={"v": (0, 2)})
    forms = make_forms(low, torch.float32)
    assert list(forms) == ["dense", "factored", "materialised"] and forms["factored"] is low
    torch.testing.assert_close(forms["materialised"](idx), low(idx), atol=1e-4, rtol=0)
    assert shapes(forms["dense"]) == shapes(forms["materialised"]) == shapes(small())
    assert list(make_forms(small(), torch.float32)) == ["dense"]
    assert list(make_forms(small(mlp_ranks=(8, 8), factor_act="silu"), torch.float32)) == [
        "dense",
        "factored",
    ]
    half = make_forms(small(mlp_ranks=(8, 8)), torch.bfloat16)
    assert {p.dtype for form in half.values() for p in form.parameters()} == {torch.bfloat16}


def test_a_step_is_the_token_after_the_prompt_however_often_it_is_taken():
    model = small()
    with torch.inference_mode():
        passes = make_passes(model, 3, 8, torch.float32)
        prompts = torch.randint(0, 60, (3, 8), generator=torch.Generator().manual_seed(0)).tolist()
        logits, cache = prefill(model, prompts, 9)
        expected = (
            next_logits(model, logits.argmax(dim=-1, keepdim=True), torch.float32, cache)
            .argmax(dim=-1)
            .tolist()
        )
        torch.testing.assert_close(passes["prefill"](), logits)
        assert [passes["step"]() for _ in range(3)] == [expected] * 3


def test_peak_bytes_by_hand():
    def function():
        a = torch.empty(1000)
        b = torch.empty(3000)
        del a
        return torch.empty(500), b

    assert peak_bytes(function, CPU) == 4 * 4000


def test_verdicts_by_hand():

    def ratio(low, median, high):
        return {"low": low, "median": median, "high": high}

    assert (
        verdict(ratio(1.2, 1.5, 1.6), "decoding")
        == "decoding: factored is faster, 1.50 (1.20-1.60) times dense"
    )
    assert (
        verdict(ratio(0.4, 0.5, 0.8), "decoding")
        == "decoding: dense is faster, 2.00 (1.25-2.50) times factored"
    )
    assert (
        verdict(ratio(0.9, 1.1, 1.2), "decoding")
        == "decoding: no difference seen, factored is 1.10 (0.90-1.20) times dense"
    )
    case = {
        "batch": 4,
        "forms": {
            "factored": {
                "tokens/s / dense": ratio(1.2, 1.5, 1.6),
                "prefill time / dense": ratio(1.25, 2, 2.5),
            }
        },
    }
    assert verdicts(case) == (
        "Batch 4: decoding: factored is faster, 1.50 (1.20-1.60) times dense; "
        "prefill: dense is faster, 2.00 (1.25-2.50) times factored."
    )


FLAGS = shlex.split(
    "--depth 2 --model-dim 32 --head-dim 16 --n-kv-head 1 --vocab-size 60 --max-seq-len 32 --prompt-tokens 8 "
    "--batch-sizes 1,3 --repeats 2 --device-type cpu --dtype float32"
)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(infer_bench, "SAMPLE_SECONDS", 1e-4)


def test_the_command(tmp_path, capsys, quick):
    out = tmp_path / "new" / "bench"
    infer_bench.main([*FLAGS, "--mlp-rank", "4", "--attn-rank", "0", "--out", str(out)])
    result = json.loads((out / "infer_bench.json").read_text())
    table = (out / "infer_bench.md").read_text()
    parameters = {
        "dense": count_parameters(GPTConfig(**SMALL)),
        "factored": count_parameters(GPTConfig(**SMALL, mlp_ranks=(4, 4))),
    }
    parameters["materialised"] = parameters["dense"]
    assert {name: form["parameters"] for name, form in result["forms"].items()} == parameters
    blocks = {name: form["blocks_bytes"] for name, form in result["forms"].items()}
    assert blocks["dense"] == 4 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 8 * 32 * 32) and blocks[
        "factored"
    ] == blocks["dense"] - 4 * 2 * (8 * 32 * 32 - 2 * 4 * 160)
    assert [case["batch"] for case in result["cases"]] == [1, 3]
    for case in result["cases"]:
        for name, form in case["forms"].items():
            # keys and values, 2 layers, 16 wide, 8 + 1 positions
            assert form["cache_bytes"] == case["batch"] * 4 * 2 * 2 * 16 * 9
            assert form["peak_bytes"] > 4 * parameters[name] + form["cache_bytes"]
            rates = [case["batch"] / seconds for seconds in form["seconds by repeat"]["step"]]
            assert form["tokens/s"]["median"] == pytest.approx(statistics.median(rates))
            assert f"{form['tokens/s / dense']['median']:.2f} (" in table
        assert case["forms"]["dense"]["tokens/s / dense"] == {"median": 1, "low": 1, "high": 1}
    printed = capsys.readouterr().out
    for line in ("### Which is faster", "Batch 1: decoding: ", "Batch 3: decoding: "):
        assert line in printed and line in table
    assert (out / "infer_bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_runs_checkpoint(train, capsys, quick):
    train("--num-iterations", 2)
    infer_bench.main(
        shlex.split("--model-tag tiny --prompt-tokens 8 --batch-sizes 2 --repeats 1 --device-type cpu")
    )
    printed = capsys.readouterr().out
    assert (
        "run tiny, step 2: width 32, 2 layers" in printed
        and "no low-rank layer: there is nothing to compare" in printed
    )


@pytest.mark.parametrize(
    "flags,message",
    [
        (
            ["--prompt-tokens", "32"],
            "^--prompt-tokens 32: leaves no room in the model's context of 32; give at most 31",
        ),
        (["--head-dim", "48"], "--head-dim 48: must divide the width 32"),
        (["--mlp-rank", "33"], "--mlp-rank .*rank 33 does not fit"),
        (["--batch-sizes", "0"], "--batch-sizes: '0' is not a whole number >= 1"),
        (["--step", "3"], "^--step 3: of which run"),
        (["--model-tag", "a"], "^--depth: the run of --model-tag a has its own"),
        (["--batch-sizes", "4000000000000"], "^--batch-sizes 4000000000000: does not fit into memory"),
        (["--out", __file__], "is a file; give a folder"),
    ],
)
def test_bad_input_is_named(base_dir, flags, message):
    with pytest.raises(InputError, match=message):
        infer_bench.main([*FLAGS, *flags])
