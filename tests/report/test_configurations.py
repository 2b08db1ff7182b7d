"""Runs as configurations: what counts as the same, what they are called, the frontier, the flags to paste."""

import itertools
import random
import shlex

import pytest

from nanochat.flags import build_parser
from nanochat.metrics import Run
from nanochat.report.configurations import (
    configurations,
    flag_defaults,
    paste_flags,
    step_seconds,
    varying_settings,
)
from nanochat.report.summaries import pareto_front

SUMMARY = {
    "status": "finished",
    "total_tokens": 409_600,
    "params/total": 5_000_000,
    "mem/peak_bytes": 600e6,
    "mem/predicted_peak_bytes": 200e6,
    "mem/weights_bytes": 20e6,
    "mem/grads_bytes": 20e6,
    "mem/optimizer_bytes": 40e6,
}


def a_run(name="run", seed=1, attn=0, mlp=0, ppl=30.0, dt=0.5, **changes):
    """A finished run as base_train records it.

    attn, mlp: a rank for all layers, or a list of ranks. changes: depth, width, and values of flags, derived,
    corpus, device and summary that replace those here.
    """
    depth = changes.pop("depth", 4)
    width = changes.pop("width", 256)
    parts = {
        part: dict(changes.pop(part, ())) for part in ("flags", "derived", "corpus", "device", "summary")
    }
    assert not changes, changes
    flags = flag_defaults() | {
        "model_tag": name,
        "seed": seed,
        "depth": depth,
        "model_dim": width,
        "head_dim": 64,
        "data": "texts",
        "num_iterations": 100,
        "attn_rank": attn if isinstance(attn, int) else attn[0],
        "mlp_rank": mlp if isinstance(mlp, int) else mlp[0],
        **parts["flags"],
    }
    corpus = {"name": "texts", "train_fingerprint": "aa", "val_fingerprint": "bb", **parts["corpus"]}
    derived = {
        "model": a_model(depth, width, ranks_by_layer(attn, depth), ranks_by_layer(mlp, depth)),
        "num_iterations": 100,
        "total_batch_size": 4096,
        "tokens": 409_600,
        "matrix_lr": 0.04,
        "tokenizer_hash": "cc",
        "val_tokens": 1000,
        "corpus": corpus,
        **parts["derived"],
    }
    device = {"type": "cpu", "name": "EPYC", "processes": 1, "threads": 2, "dtype": "float32"}
    config = {"flags": flags, "derived": derived, "device": device | parts["device"], "seed": seed}
    history = [{"step": step, "train/dt": 9.0 if step == 1 else dt} for step in range(1, 31)]
    return Run(name, config, {**SUMMARY, "val/ppl": ppl, **parts["summary"]}, history)


def ranks_by_layer(rank, depth: int) -> list:
    if isinstance(rank, (list, tuple)):
        return list(rank)
    return [rank] * depth if rank else []


def a_model(depth: int, width: int, attn_ranks: list, mlp_ranks: list) -> dict:
    return {
        "sequence_len": 256,
        "vocab_size": 4096,
        "n_layer": depth,
        "n_head": width // 64,
        "n_kv_head": width // 64,
        "n_embd": width,
        "window_pattern": "SSSL",
        "attn_ranks": attn_ranks,
        "mlp_ranks": mlp_ranks,
        "lm_head_rank": 0,
        "tie_embeddings": False,
        "value_embeddings": False,
    }


def test_runs_that_differ_in_the_seed_alone_are_one_configuration():
    runs = [
        a_run("b2", seed=2),
        a_run("low", attn=96, mlp=96),
        a_run("b1", seed=1, flags={"run": "shown", "save_every": 10}),
    ]
    full, low = configurations(runs)
    assert [r.name for r in full.runs] == ["b1", "b2"] and [r.name for r in low.runs] == ["low"]
    assert (full.name, low.name) == ("full rank", "attn 96, mlp 96")
    assert (full.low_rank, low.low_rank) == (False, True)


@pytest.mark.parametrize(
    "change",
    [
        {"flags": {"embedding_lr": 0.1}},
        {"derived": {"matrix_lr": 0.02}},
        {"depth": 5},
        {"width": 320},
        {"derived": {"num_iterations": 200}},
        {"device": {"name": "M2"}},
        {"device": {"dtype": "bfloat16"}},
        {"corpus": {"train_fingerprint": "dd"}},
        {"flags": {"device_batch_size": 8}},
        {"flags": {"warmdown_ratio": 0.3}},
        {"flags": {"matrix_ranks": "v=64"}},
        {"flags": {"factor_act": "silu"}},
        {"flags": {"mlp_ratio": 1.5}},
    ],
)
def test_what_makes_another_configuration(change):
    both = configurations([a_run("one"), a_run("other", seed=2, **change)])
    assert len(both) == 2 and both[0].name != both[1].name


def test_linear_and_not_linear_are_told_apart_by_name():
    ranks = {"matrix_ranks": "k=0.25,q=0.25"}
    named = configurations(
        [
            a_run("linear", mlp=64, flags=ranks),
            a_run("act", mlp=64, flags={**ranks, "factor_act": "silu"}),
            a_run("full"),
        ]
    )
    assert [c.name for c in named] == ["mlp 64, k 0.25, q 0.25", "mlp 64, k 0.25, q 0.25, silu", "full rank"]


def test_a_multiple_is_a_setting_where_the_settings_have_a_fraction_and_else_what_it_makes_of_the_rank():
    def run(name, multiple, **changes):
        made = a_run(name, **changes)
        made.config["derived"]["model"]["rank_multiple"] = multiple
        return made

    fraction = dict(attn=[0.297] * 4, flags={"attn_rank": 0.297, "mlp_rank": 0})
    both = configurations([run("before", 1, **fraction), run("now", -1, **fraction)])
    assert [c.name for c in both] == ["attn 76", "attn 80"]
    quarter = dict(attn=[0.25] * 4, flags={"attn_rank": 0.25})
    for same in (quarter, dict(width=192, **fraction), dict(attn=64), {}):
        assert len(configurations([run("before", 1, **same), run("now", -1, seed=2, **same)])) == 1

    def single(name, multiple):
        made = run(name, multiple, flags={"matrix_ranks": "q=0.297"})
        made.config["derived"]["model"]["matrix_ranks"] = {"q": [0.297] * 4}
        return made

    both = configurations([single("before", 1), single("now", -1)])
    assert [c.name for c in both] == ["q 0.297, rank multiple 1", "q 0.297, rank multiple -1"]


def test_solved_ranks_of_single_matrices_are_those_of_the_model():
    asked = {"matrix_ranks": "down=0.5,v=0", "solve": "rank", "budget_params": "9"}
    made = a_run("deep", attn=[96] * 4, flags=asked)
    made.config["derived"]["model"]["matrix_ranks"] = {"v": [0] * 4, "down": [64, 64, 8, 8]}
    long = a_run("list", flags={"matrix_ranks": "down=64/56/48/40/32/24/16"})
    assert [c.name for c in configurations([made, long])] == ["attn 96, down 64/64/8/8, v 0", "down 64…16"]


def test_a_shape_is_what_it_was_resolved_to():
    """A budget that gives this depth and rank makes no difference, nor a flag that older versions lacked."""
    flags = {"budget_params": "full", "solve": "rank", "attn_rank": 0.5, "mlp_rank": 0.5, "aspect_ratio": 32}
    asked = a_run("asked", attn=64, mlp=64, flags=flags)
    older = a_run("older", seed=3, attn=64, mlp=64)
    del older.config["flags"]["grad_clip"]
    newer = a_run("newer", seed=4, attn=64, mlp=64)
    newer.config["derived"]["model"]["layer_kinds"] = []
    assert len(configurations([asked, a_run("given", seed=2, attn=64, mlp=64), older, newer])) == 1
    newer.config["derived"]["model"]["layer_kinds"] = ["L", "S", "L", "S"]
    assert len(configurations([older, newer])) == 2


def test_names_tell_configurations_apart():
    def named(*runs):
        return [c.name for c in configurations(list(runs))]

    assert named(a_run(attn=96)) == ["attn 96"]
    assert named(a_run(depth=4), a_run(depth=8, attn=96)) == ["full rank, 4 layers", "attn 96, 8 layers"]
    assert named(a_run(), a_run(derived={"matrix_lr": 0.02})) == [
        "full rank, matrix lr 0.04",
        "full rank, matrix lr 0.02",
    ]
    assert named(a_run(), a_run(flags={"mlp_ratio": 1.5})) == ["full rank", "full rank, MLP × 1.5"]
    assert named(a_run(mlp=[100, 50, 20, 5]), a_run(mlp=[5, 20, 50, 100])) == [
        "mlp 100-50-20-5",
        "mlp 5-20-50-100",
    ]
    deep = [
        a_run(tag, depth=8, mlp=ranks)
        for tag, ranks in (("x", [8, 7, 6, 5, 4, 3, 2, 1]), ("y", [8, 6, 6, 5, 4, 3, 3, 1]))
    ]
    assert named(deep[0]) == ["mlp 8…1"] and named(*deep) == ["mlp 8…1 (x)", "mlp 8…1 (y)"]
    many = [
        a_run(attn=a, mlp=m, depth=d, derived={"matrix_lr": lr})
        for a, m, d, lr in itertools.product((0, 32), (0, 64), (4, 8), (0.02, 0.04))
    ]
    assert len(set(named(*many))) == 16


def test_values_are_those_of_finished_runs_and_finite():
    (config,) = configurations(
        [
            a_run("a", 1, ppl=30.0),
            a_run("b", 2, ppl=float("nan")),
            a_run("c", 3, ppl=32.0),
            a_run("d", 4, ppl=99.0, summary={"status": "stopped"}),
        ]
    )
    assert config.values("val/ppl") == [30.0, 32.0] and config.mean("val/ppl") == 31.0
    assert config.values("step_time") == [0.5] * 3
    assert config.mean("no/such") is None


def test_step_seconds_is_the_median_after_the_first_ten():
    def run(*times):
        return Run("r", {}, {}, [{"step": i + 1, "train/dt": t} for i, t in enumerate(times)])

    assert step_seconds(run(*[9] * 10, 1, 3, 2)) == 2
    assert step_seconds(run(9, 1, 2, 3, 4)) == 2.5
    assert step_seconds(run(9)) is None and step_seconds(Run("r", {}, {}, [])) is None


def test_varying_settings_are_those_that_differ():
    configs = configurations(
        [
            a_run(),
            a_run(attn=96),
            a_run(attn=32, depth=8),
            a_run(attn=[9, 5, 2, 1], derived={"matrix_lr": 0.02}),
        ]
    )
    varying = varying_settings(configs)
    assert varying == {
        "depth": [4, 8],
        "attn_rank": [0, 32, 96, "9-5-2-1"],
        "matrix_lr": [0.02, 0.04],
    }
    assert all(config.settings["attn_rank"] in varying["attn_rank"] for config in configs)


def is_beaten(point, points) -> bool:
    return any(q != point and q[0] <= point[0] and q[1] <= point[1] for q in points)


def test_pareto_against_the_definition():
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randrange(12) / 4, rng.randrange(12) / 4) for _ in range(20)]
        front = pareto_front(points)
        assert [points[i] for i in front] == sorted({p for p in points if not is_beaten(p, points)})
    assert pareto_front([(1.0, float("nan")), (2.0, 1.0), (float("inf"), 0.0)]) == [1]


def test_pasted_flags_make_the_same_run():
    run = a_run(
        "low",
        seed=7,
        mlp=64,
        flags={
            "data": "my texts",
            "ppl_thresholds": [50.0, 30.0],
            "tie_embeddings": True,
            "matrix_lr": 0.02,
            "run": "shown",
            "budget_params": "full",
            "solve": "depth",
            "weight_decay": 1e-5,
        },
    )
    words = paste_flags(configurations([run])[0])
    args = vars(build_parser().parse_args(shlex.split(words)))
    differing = {key for key, given in run.config["flags"].items() if args[key] != given}
    assert differing == {"run", "model_tag", "seed", "budget_params"}
    assert args["budget_params"] == "5000000"  # a number, as the named run may not exist elsewhere
    assert "--total-batch-size" not in words


def test_a_fraction_is_the_rank_that_it_is():
    both = configurations(
        [a_run("share", attn=64, mlp=64, derived={}), a_run("rank", seed=2, attn=64, mlp=64)]
    )
    both[0].runs[0].config["derived"]["model"].update(attn_ranks=[0.25] * 4, mlp_ranks=[0.25] * 4)
    both[0].runs[0].config["flags"].update(attn_rank=0.25, mlp_rank=0.25)
    [one] = configurations(list(both[0].runs))
    assert one.name == "attn 64, mlp 64" and len(one.runs) == 2
    model = both[0].runs[0].config["derived"]["model"]
    model["mlp_ratio"] = 0.5  # a narrow MLP, whose fraction is of its own width
    assert configurations([both[0].runs[0]])[0].settings["mlp_rank"] == 32
    model["n_kv_head"] = 1  # there the fraction is 64 of q and o, 16 of k and v
    assert configurations([both[0].runs[0]])[0].settings["attn_rank"] == 0.25
