"""The layer bench: what it counts, and what it writes; nothing depends on the machine's speed."""

import json
import shlex
from functools import partial

import pytest
import torch

from nanochat.accounting import matrix_parameters, on_meta
from nanochat.benchmark import spread, take_turns
from nanochat.errors import InputError
from nanochat.gpt import GPTConfig, make_linear
from nanochat.report.layer_bench_page import rank_text
from scripts import layer_bench
from scripts.layer_bench import break_even, kept_bytes, layer_shapes, summary

CPU = torch.device("cpu")


def test_layers_of_one_shape_are_named_together():
    plain = GPTConfig(vocab_size=100, n_layer=1, n_head=4, n_kv_head=4, n_embd=64)
    assert layer_shapes(plain) == [
        ("q, k, v, o", 64, 64),
        ("MLP up", 64, 256),
        ("MLP down", 256, 64),
        ("lm_head", 64, 100),
    ]
    # a head of the shape of MLP up
    grouped = GPTConfig(vocab_size=256, n_layer=1, n_head=4, n_kv_head=1, n_embd=64)
    assert layer_shapes(grouped) == [
        ("q, o", 64, 64),
        ("k, v", 64, 16),
        ("MLP up", 64, 256),
        ("MLP down", 256, 64),
        ("lm_head", 64, 256),
    ]


@pytest.mark.parametrize("dtype,size", [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("rank", [0, 8])
def test_kept_bytes_by_hand(rank, dtype, size):
    layer = make_linear(48, 32, rank)
    x = torch.randn(10, 48).to(dtype).requires_grad_()
    copies = 0 if size == 4 else size * sum(p.numel() for p in layer.parameters())
    assert kept_bytes(layer, x) == size * 10 * (48 + rank) + copies


def test_break_even_by_hand():
    assert break_even([10, 20, 40], [0.5, 0.9, 1.1]) == {"rank": pytest.approx(30), "is": "="}
    assert (
        break_even([10, 20, 40], [0.5, 1.0, 1.1])
        == break_even([10, 20], [0.5, 1.0])
        == {"rank": 20, "is": "="}
    )
    # the first time, where noise makes several
    assert break_even([10, 20, 40], [0.9, 1.1, 0.95]) == {
        "rank": pytest.approx(15),
        "is": "=",
    }
    assert break_even([10, 20], [0.5, 0.99]) == {"rank": 20, "is": ">"}
    assert break_even([10, 20], [1.2, 1.5]) == {"rank": 10, "is": "<"}

    def at(rank, is_="="):
        return {"rank": rank, "is": is_}

    assert rank_text({"low": at(90), "median": at(97.3), "high": at(128, ">")}) == "97 (90 to above 128)"
    assert rank_text({key: at(8, "<") for key in ("low", "median", "high")}) == "below 8"


def test_variants_take_turns_and_each_is_first_in_turn():
    log = []
    runs = {}
    for rank in (0, 4, 8):
        forward = partial(log.append, (rank, "forward"))
        runs[rank] = {"forward": forward, "backward": partial(log.append, (rank, "backward"))}
    seconds = take_turns(runs, 4, CPU, 0)
    measured = [rank for rank, name in log[-4 * 6 :] if name == "forward"]
    assert measured == [0, 4, 8, 4, 8, 0, 8, 0, 4, 0, 4, 8]
    assert log[-1] == (8, "backward") and all(
        len(values) == 4 for passes in seconds.values() for values in passes.values()
    )


def test_ratios_are_taken_within_a_repeat():
    """A machine that is slower by the repeat, and a layer that takes half the time of dense in each."""
    subjects = {rank: {"layer": make_linear(32, 32, rank), "kept_bytes": 0} for rank in (0, 8)}
    seconds = {
        0: {"forward": [1, 2, 40], "backward": [3, 6, 40]},
        8: {"forward": [0.5, 1, 20], "backward": [1.5, 3, 20]},
    }
    dense, low = summary(subjects, seconds, 6)
    assert low["ratio"]["forward"] == low["ratio"]["total"] == spread([0.5]) and dense["ratio"][
        "total"
    ] == spread([1])
    assert (
        low["flops"] == 6 * 8 * 64 and low["ratio"]["flops"] == 0.5 and low["ratio"]["total over flops"] == 1
    )
    assert low["seconds"]["total"]["median"] == 4 and low["weights_bytes"] == 4 * 8 * 64


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layer_bench, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(layer_bench, "COLD_BYTES", 2**16)
    out = tmp_path / "new" / "bench"
    flags = "--model-dim 32 --head-dim 16 --n-kv-head 1 --vocab-size 5000 --ranks 0.5,4 --tokens 16,600,700"
    layer_bench.main(
        shlex.split(f"{flags} --repeats 3 --device-type cpu --dtype float32") + ["--out", str(out)]
    )
    result = json.loads((out / "layer_bench.json").read_text())
    table = (out / "layer_bench.md").read_text()
    cases = {(case["layers"], case["mode"], case["tokens"]): case for case in result["cases"]}
    names = ["q, o", "k, v", "MLP up", "MLP down", "lm_head"]
    assert list(cases) == [(name, "training", n) for n in (16, 600, 700) for name in names] + [
        (name, "decoding", 1) for name in names
    ]
    # as the model takes it
    assert [cases["lm_head", "training", n]["rows"] for n in (16, 600, 700)] == [
        16,
        512,
        512,
    ]

    model = on_meta(GPTConfig(vocab_size=5000, n_layer=1, n_head=2, n_kv_head=1, n_embd=32))
    for mode, tokens, flops in (("training", 16, 6 * 16), ("decoding", 1, 2)):
        counted = sum(
            cases[name, mode, tokens]["variants"][0]["flops"] * len(name.split(", ")) for name in names
        )
        assert counted == flops * matrix_parameters(model)
    for case in result["cases"]:
        dense, *low = case["variants"]
        assert [v["rank"] for v in case["variants"]] == [0, 4, 8 if case["layers"] == "k, v" else 16]
        assert dense["ratio"]["total"] == {"median": 1, "low": 1, "high": 1}
        passes = ["forward"] if case["mode"] == "decoding" else ["forward", "backward"]
        assert all(
            list(v["seconds"]) == [*passes, "total"] and v["seconds"]["total"]["median"] > 0
            for v in case["variants"]
        )
        for v in low:
            assert v["ratio"]["flops"] == v["rank"] * (case["in"] + case["out"]) / (case["in"] * case["out"])
            assert f"{v['ratio']['total']['median']:.2f} (" in table
        assert case["break-even rank"]["median"] == break_even(
            [v["rank"] for v in low], [v["ratio"]["total"]["median"] for v in low]
        )
    printed = capsys.readouterr().out
    for line in (
        "### Break-even rank",
        "### Training, 600 tokens",
        "### Decoding, 1 token",
        "lm_head (32 → 5000), 512 at once",
    ):
        assert line in printed and line in table
    assert (out / "layer_bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--head-dim", "48"], r"--head-dim 48: does not divide --model-dim 256"),
        (["--n-kv-head", "3"], r"--n-kv-head 3: must divide the 4 heads"),
        (["--ranks", "300"], r"--ranks: q, k, v, o: rank 300 does not fit"),
        (["--ranks", "0,8"], r"--ranks: 0: full rank is measured anyway"),
        (["--ranks", "1.5"], r"--ranks: '1.5': give 0"),
        (["--ranks", ","], r"--ranks: '': give"),
        (["--tokens", "many"], r"--tokens: 'many' is not a whole number >= 1"),
        (["--tokens", ""], r"--tokens: '' is not a whole number >= 1"),
        (
            ["--tokens", "4000000000000", "--device-type", "cpu"],
            r"--tokens 4000000000000: q, k, v, o \(256 → 256\) does not fit into memory",
        ),
        (["--out", __file__], r"--out .*test_layer_bench.py: is a file; give a folder"),
    ],
)
def test_bad_flags_are_one_line(flags, message):
    with pytest.raises(InputError, match=message) as e:
        layer_bench.main(flags)
    assert "\n" not in str(e.value)
