"""Adapters and subspaces in a report: names, numbers against scipy's, pictures drawn, no verdict on them."""

import math

import pytest
from test_report import base, write_run  # noqa: F401  a fixture

from nanochat.metrics import Run
from nanochat.naming import base_name
from nanochat.report import plotting
from nanochat.report.adapter_figures import mean_steps, rho_words
from nanochat.report.configurations import configurations
from nanochat.report.csv_export import pair_keys
from nanochat.report.method_section import method_section
from nanochat.report.statistics import (
    d90,
    loss_at_start,
    rank_grid,
    rank_shares,
    sample_ranks,
    spearman,
    spearman_interval,
)
from nanochat.report.subspace_figures import d90_rows
from nanochat.report.summaries import baseline
from nanochat.report.trained_figures import draw_trained
from nanochat.report.verdict import verdict
from scripts import report


def run(name, loss=3.0, seed=1, start=None, trained=None, summary=(), **flags):
    """A finished run of two layers.

    start: its loss at step 0, which adapters record. attn, among the flags: the rank of its model.
    """
    attn = flags.pop("attn", 0)
    history = [{"step": 10, **losses(loss), "train/dt": 1.0, "total_training_time": 10.0, "total_tokens": 10}]
    if start is not None:
        history.insert(0, {"step": 0, **losses(start), "val/bpb": 1.0})
    model = {"n_layer": 2, "n_embd": 32, "vocab_size": 403, "attn_ranks": [attn] * 2, "mlp_ranks": [attn] * 2}
    config = {
        "flags": {"seed": seed, **flags},
        "seed": seed,
        "reference_losses": {"uniform": 6.0, "unigram": 5.0},
        "derived": {"model": model, "corpus": {"val_fingerprint": "b"}, "tokenizer_hash": "c"},
        "device": {"type": "cpu", "name": "EPYC", "dtype": "float32", "processes": 1, "threads": 2},
    }
    results = {
        "status": "finished",
        **losses(loss),
        "params/total": 1000,
        "mem/predicted_peak_bytes": 1e6,
        "params/embedding": 200,
        "params/lm_head": 100,
        "total_training_time": 10.0,
    }
    if trained is not None:
        results |= {"params/trained": trained, "params/stored_bits": 32 * trained}
    return Run(name, config, results | dict(summary), history)


def losses(loss: float) -> dict:
    return {"val/loss": loss, "val/ppl": math.exp(loss)}


def lora(name, rank=8, base_tag="s_d2_s1", **given):
    return run(
        name,
        adapter="lora",
        rank=rank,
        alpha=16.0,
        model_tag=base_tag,
        run_tag=f"s_{name}_s1",
        **{"start": 3.5, "trained": 10 * rank, **given},
    )


def subspace(name, dim, loss, kind="basis", **given):
    return run(
        name, loss, subspace=kind, subspace_dim=dim, subspace_scope="global", trained=500 + dim, **given
    )


# ---- numbers -----------------------------------------------------------------------------------------------


def test_d90_is_interpolated_in_the_logarithm_an_upper_bound_or_not_reached():
    assert d90([(1000, 3.0), (10, 5.0), (100, 4.0)], start=6.0, full=2.0) is None  # 6 - 0.9 * 4 = 2.4
    # (4 - 2.4) / (4 - 2) of a decade
    assert d90([(10, 5.0), (100, 4.0), (1000, 2.0)], 6.0, 2.0) == pytest.approx(100 * 10**0.8)
    assert d90([(10, 5.0), (100, 2.4)], 6.0, 2.0) == pytest.approx(100)
    assert d90([(10, 2.0), (100, 1.0)], 6.0, 2.0) == 10
    # the smallest, though a larger one does not
    assert d90([(10, 2.0), (100, 3.0), (1000, 2.0)], 6.0, 2.0) == 10


def test_d90_is_by_method_and_seed_against_the_full_run_of_that_seed():
    full = [run("f1", 2.0, 1, subspace=""), run("f2", 1.0, 2, subspace="")]
    some = [
        subspace(f"b{d}_{s}", d, loss, seed=s)
        for s in (1, 2, 3)
        for d, loss in ((10, 5.0), (100, 4.0), (1000, 2.0))
    ]
    configs = configurations(full + some)
    lines = {"basis in all": [c for c in configs if c.method]}
    rows = d90_rows(lines, baseline(configs, "val/ppl"))
    # seed 3 has no full run
    assert rows == [
        ["basis in all", "1", "6.0000", "2.0000", "2.4000", "631"],
        ["basis in all", "2", "6.0000", "1.0000", "1.5000", "not reached (largest tried: 1,000)"],
    ]
    assert loss_at_start(subspace("x", 1, 3.0, start=5.5)) == 5.5
    assert loss_at_start(Run("x", {"derived": {"model": {"vocab_size": 100}}}, {}, [])) == pytest.approx(
        math.log(100)
    )


@pytest.mark.parametrize(
    "x, y",
    [
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]),
        ([1, 1, 2, 3, 3, 3], [5, 4, 4, 1, 0, 1]),
        ([0.1, 9, 3, 3], [1, 2, 2, 2]),
    ],
)
def test_rank_correlation_is_scipys_ties_included(x, y):
    from scipy.stats import spearmanr  # slow to import

    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    low, high = spearman_interval(x, y, resamples=200)
    assert -1 <= low <= spearman(x, y) <= high <= 1 and spearman_interval(x, y, resamples=200) == (low, high)


def test_rank_correlation_of_little():
    assert sample_ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2] and math.isnan(spearman([1, 1], [1, 2]))
    assert spearman_interval([1, 2, 3], [1, 2, 3]) is None
    assert rho_words([(1, 1), (2, 2), (3, 3)]) == "1.00 (too few for an interval), 3 maps"
    assert spearman_interval(range(30), range(30), resamples=100) == pytest.approx((1, 1))


def test_adaloras_ranks_by_layer_and_matrix():
    some = [
        lora(
            f"a{s}",
            seed=s,
            summary={
                "adalora/ranks": {
                    "blocks.0.attn.q": 1,
                    "blocks.1.attn.q": s,
                    "blocks.10.mlp.up": 6,
                    "blocks.1.mlp.up": 0,
                }
            },
        )
        for s in (1, 3)
    ]
    layers, matrices, grid = rank_grid(some)
    assert (layers, matrices) == ([0, 1, 10], ["attn.q", "mlp.up"])
    assert grid[0][:2] == [1, 2]
    assert math.isnan(grid[0][2])
    assert math.isnan(grid[1][0]) and grid[1][1:] == [0, 6]
    # sums 1, 2, 6 by layer, of which the middle one counts half; 3 and 6 by matrix
    late, mlp = rank_shares(layers, matrices, grid)
    assert late == pytest.approx(7 / 9) and mlp == pytest.approx(6 / 9)


# ---- names, and what is compared with what -----------------------------------------------------------------


def test_methods_have_names_and_bases_tell_them_apart():
    some = configurations(
        [
            run("full"),
            lora("a"),
            lora("b", rank=4),
            lora("c", base_tag="s_d4_s1"),
            lora("d", layer_map="0,0,1"),
            run("ft", adapter="none", model_tag="s_d2_s1"),
            subspace("e", 5, 4.0),
            subspace("f", 7, 4.0, kind="fastfood", subspace_scales=True),
            run("g", subspace="lora-random", subspace_rank=4, freeze_embeddings=True),
            run("h", subspace="none"),
        ]
    )
    names = {c.runs[0].name: c.name for c in some}
    assert names["full"].startswith("full rank")
    assert names["b"].startswith("LoRA 4")
    assert names["ft"].startswith("full fine-tuning")
    assert names["a"].startswith("LoRA 8, base d2")
    assert names["c"].startswith("LoRA 8, base d4")
    assert "layer map 0,0,1" in names["d"]
    assert names["e"].startswith("basis 5 in all")
    assert names["f"].startswith("structure-aware Fastfood 7 in all")
    assert names["g"].startswith("LoRA on noise 4, no embeddings")
    assert names["h"].startswith("embeddings only")
    assert not any("unset" in name for name in names.values()) and len(set(names.values())) == len(some)
    assert base_name({"model_tag": "virtual-small_real8_s2", "run_tag": "virtual-small_real12_s1"}) == "real8"
    assert base_name({"model_tag": "d4"}) == "d4"
    seeds = configurations([lora("a", seed=1), lora("b", seed=2, base_tag="s_d2_s2")])
    assert len(seeds) == 1  # each on the base of its seed


def test_they_are_no_full_rank_baseline_and_enter_no_verdict():
    low = run("low", 3.2, attn=4, attn_rank=4, mlp_rank=4, summary={"params/total": 800})
    full = run("full", 3.0, attn_rank=0, mlp_rank=0)
    others = [lora("a", loss=1.0), lora("b", loss=1.0, attn=4), subspace("e", 5, 1.0)]
    configs = configurations([low, full, *others])
    assert [c.method for c in configs] == ["", "", "LoRA", "LoRA", "basis"]
    assert [c.low_rank for c in configs] == [True, False, False, False, False]
    assert baseline(configs, "val/ppl").runs[0].name == "full"
    assert verdict(configs) == verdict(configurations([low, full])) or [
        h.cases for h in verdict(configs)
    ] == [h.cases for h in verdict(configs[:2])]
    keys = pair_keys(configs)
    assert keys["low"] == keys["full"] and len({keys[name] for name in ("full", "a", "b", "e")}) == 4


# ---- which pictures, and the report ------------------------------------------------------------------------

MAPS = [
    lora(f"m{i}", layer_map=text, start=start, loss=loss)
    for i, (text, start, loss) in enumerate((("0,0,1", 4.0, 3.1), ("0,1,1", 4.5, 3.2), ("0,1,0", 6.0, 3.15)))
]
RANKS = {"adalora/ranks": {"blocks.0.attn.q": 1, "blocks.1.mlp.up": 3}}


@pytest.mark.parametrize(
    "runs, names",
    [
        ([run("full"), run("low", attn=4, attn_rank=4)], set()),
        ([run("full"), lora("a"), lora("b", rank=4)], {"trained.png", "adapted.png"}),
        ([run("full"), run("h", subspace="none", trained=400)], {"trained.png"}),
        ([run("full"), subspace("x", 5, 4.0), subspace("y", 50, 3.5)], {"trained.png", "subspace.png"}),
        ([lora("a"), *MAPS], {"trained.png", "adapted.png", "untrained.png"}),
        ([run("full"), lora("a", summary=RANKS)], {"trained.png", "adapted.png", "adalora_ranks.png"}),
    ],
)
def test_only_the_pictures_that_the_runs_give_reason_for(runs, names, monkeypatch):
    monkeypatch.setattr("nanochat.report.plotting.png_with_hotspots", lambda fig, spots: (b"", spots))
    blocks, figures = method_section(configurations(runs), "loss")
    assert figures.keys() == names
    assert [b[1] for b in blocks if b[0] == "figure"] == list(figures)
    assert bool(blocks) == bool(names)


def test_what_is_drawn_is_what_was_trained(monkeypatch):
    _, (fig, spots), [table] = draw_trained(
        configurations(
            [
                run("full", summary={"params/total": 2000}),
                lora("a", trained=80, loss=2.5),
                run("near", 4.9, subspace="none", trained=400),
            ]
        )
    )
    assert [(x, y) for _, x, y, _ in spots] == [
        (1700, 3.0),
        (80, 2.5),
        (100, 4.9),
        (2000, 3.0),
        (80, 2.5),
        (400, 4.9),
        (64000, 3.0),
        (2560, 2.5),
        (12800, 4.9),
    ]
    assert [row[1:4] for row in table[2]] == [
        ["80", "80", "2.56 kbit"],
        ["400", "100", "12.8 kbit"],
        ["2,000", "1,700", "64.0 kbit"],
    ]
    assert "unigram 5.00" in [text.get_text() for text in fig.axes[1].texts]
    [config] = configurations(
        [lora("a", seed=1, start=3.5, loss=3.0), lora("b", seed=2, start=4.5, loss=2.0)]
    )
    assert mean_steps(config) == [(0, 4.0), (10, 2.5)]


def test_a_report_of_such_runs_alone_and_beside_ordinary_ones(base, monkeypatch):  # noqa: F811
    monkeypatch.setattr("scripts.report.draw_sweep_figures", lambda *_: {})  # drawn in test_sweep_figures.py
    monkeypatch.setattr("scripts.report.draw_run_figures", lambda *_: {})
    finish = plotting.png_with_hotspots
    monkeypatch.setattr(plotting, "png_with_hotspots", lambda *_: (b"a picture", []))
    history = [
        {"step": 0, "val/loss": 4.0, "val/ppl": 54.6, "val/bpb": 1.2},
        {"step": 200, "val/loss": 3.0, "val/ppl": 20.0, "val/bpb": 1.0, "total_tokens": 1},
    ]
    for i, text in enumerate(("", "0,0,1", "0,1,1", "0,1,0", "1,0")):
        write_run(
            base,
            f"x_l{i}_s1",
            {
                "flags": {
                    "adapter": "lora",
                    "rank": 8,
                    "layer_map": text,
                    "model_tag": "x_d4_s1",
                    "run_tag": f"x_l{i}_s1",
                    "seed": 1,
                }
            },
            {
                "params/trained": 5000,
                "params/stored_bits": 160_000,
                "val/loss": 3 + i / 10,
                "val/ppl": 20.0 + i,
                "adalora/ranks": RANKS["adalora/ranks"],
            },
            history,
        )
    report.main([*(f"x_l{i}_s1" for i in range(5)), "--out", str(base / "out")])
    page = (base / "out" / "report.md").read_text()
    assert "What is trained" in page
    assert "LoRA 8, layer map 0,0,1" in page
    assert "Spearman" in page
    assert "The verdict" not in page
    assert {"trained.png", "untrained.png", "adapted.png", "adalora_ranks.png"} <= {
        p.name for p in (base / "out").iterdir()
    }
    write_run(base, "full")
    monkeypatch.setattr(
        plotting,
        "png_with_hotspots",
        lambda fig, spots: finish(fig, spots) if len(fig.axes) == 2 else (b"", []),
    )
    runs = report.load_runs(["full", "x_l0_s1"])
    _, blocks, figures, _ = report.run_report(runs, configurations(runs), {})
    assert figures["trained.png"][0].startswith(b"\x89PNG")
    assert len(figures["trained.png"][1]) == 4
    assert ("heading", "What is trained") in blocks
    assert ("heading", "The verdict") not in blocks
