"""The verdict: intervals against scipy's and a simulation, which runs are paired, what is not concluded."""

import math

import numpy as np
import pytest
import scipy
from test_configurations import a_run

from nanochat.errors import InputError
from nanochat.report.comparisons import Case, Comparison
from nanochat.report.configurations import configurations
from nanochat.report.page import to_markdown, to_page
from nanochat.report.pairing import MAX_SEEDS, best_settings, half_width, interval, seeds_to_settle
from nanochat.report.verdict import (
    NOT_APPLICABLE,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Claim,
    judge_claim,
    verdict,
)
from nanochat.report.verdict_page import conclusion, ratio_text, verdict_blocks

FULL = [30.0, 30.9, 29.6, 30.3]
FULL_DT = [0.50, 0.52, 0.49, 0.51]


def full_runs(ppl=FULL, dt=FULL_DT, **changes):
    return [a_run(f"full{s}", s, ppl=p, dt=t, **changes) for s, (p, t) in enumerate(zip(ppl, dt), 1)]


def low_runs(ppl_ratios, dt_ratios=(0.70, 0.71, 0.69, 0.70), rank=64, peak=150e6, tag="low", **changes):
    summary = {
        "mem/predicted_peak_bytes": peak,
        "params/total": 4_000_000,
        **dict(changes.pop("summary", {})),
    }
    return [
        a_run(
            f"{tag}{rank}_{s}",
            s,
            attn=rank,
            mlp=rank,
            ppl=FULL[s - 1] * p,
            dt=FULL_DT[s - 1] * t,
            summary=summary,
            **changes,
        )
        for s, (p, t) in enumerate(zip(ppl_ratios, dt_ratios), 1)
    ]


def judge(runs, **margins):
    return verdict(configurations(runs), **margins)


def text_of(hypotheses) -> str:
    return to_markdown(verdict_blocks(hypotheses))


# ---- numbers -----------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_a_paired_t_test():
    ratios = [1.02, 1.035, 1.027, 1.01]
    h1, h2, _ = judge(full_runs() + low_runs(ratios), confidence=0.9)
    (e,) = h2.cases[0].estimates
    low = np.log(np.multiply(FULL, ratios))
    high = np.log(FULL)
    expected = scipy.stats.ttest_rel(low, high).confidence_interval(0.9)
    assert e.ratio == pytest.approx(np.prod(ratios) ** 0.25)
    assert (e.low, e.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    time, memory = h1.cases[0].estimates[:2]
    expected = scipy.stats.ttest_rel(
        np.log(np.multiply(FULL_DT, (0.70, 0.71, 0.69, 0.70))), np.log(FULL_DT)
    ).confidence_interval(0.9)
    assert (time.low, time.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert memory.ratio == memory.low == memory.high == pytest.approx(0.75)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_the_interval_covers_as_often_as_it_says(n):
    rng = np.random.default_rng(n)
    trials = 3000
    covered = 0
    for values in rng.normal(0.03, 0.01, (trials, n)):
        low, high = interval(list(values), 0.95)
        if low < 0.03 < high:
            covered += 1
    assert covered / trials == pytest.approx(0.95, abs=4 * math.sqrt(0.05 * 0.95 / trials))


def test_more_seeds_settle_it():
    values = [0.03, 0.05, 0.055]
    n = seeds_to_settle(values, math.log(1.06), 0.95)
    sd = np.std(values, ddof=1)
    distance = math.log(1.06) - np.mean(values)
    half = {m: scipy.stats.t.ppf(0.975, m - 1) * sd / math.sqrt(m) for m in (n - 1, n)}
    assert half[n] < distance <= half[n - 1] and n > 3
    assert half_width(sd, n, 0.95) == pytest.approx(half[n])
    assert seeds_to_settle([0.03], 0.05, 0.95) == 2
    assert seeds_to_settle(values, np.mean(values) + 1e-4, 0.95) is None


def test_choosing_a_rate_on_the_seed_compared_would_flatter_and_is_not_done():
    """Five rates that are equal but for luck: chosen on the same seed, they look better than they are."""
    rng = np.random.default_rng(0)
    unbiased = []
    naive = []
    for _ in range(400):
        points = [dict(enumerate(row)) for row in rng.normal(0.0, 1.0, (5, 4))]
        unbiased += best_settings(points).unbiased.values()
        for seed in range(4):
            naive.append(min(point[seed] for point in points))
    assert np.mean(naive) < -1 and abs(np.mean(unbiased)) < 4 / math.sqrt(len(unbiased))


# ---- supported, not supported, undecided -------------------------------------------------------------------


def test_clear_cases():
    good = [1.020, 1.022, 1.019, 1.021]
    h1, h2, h3 = judge(full_runs() + low_runs(good))
    assert (h1.verdict, h2.verdict, h3.verdict) == (SUPPORTED, SUPPORTED, NOT_APPLICABLE)
    assert judge(full_runs() + low_runs(good), margin_ppl=0.01)[1].verdict == NOT_SUPPORTED
    assert judge(full_runs() + low_runs(good), margin_time=0.4)[0].verdict == NOT_SUPPORTED
    assert judge(full_runs() + low_runs(good), margin_memory=0.3)[0].verdict == NOT_SUPPORTED
    assert judge(full_runs() + low_runs(good, dt_ratios=[0.7, 1.3, 0.9, 1.1]))[0].verdict == UNDECIDED


def test_h3_wants_depth_and_equal_parameters():
    def deep(**summary):
        return low_runs([0.970, 0.975, 0.972, 0.971], depth=8, summary={"params/total": 4_950_000, **summary})

    h1, h2, h3 = judge(full_runs() + deep())
    assert h3.verdict == SUPPORTED and "parameters × 0.990" in h3.cases[0].baseline
    assert h1.verdict == h2.verdict == NOT_APPLICABLE  # there is no full-rank run of that depth
    assert judge(full_runs() + deep(), equal_params=0.005)[2].verdict == NOT_APPLICABLE
    more = judge(full_runs() + deep(**{"params/total": 5_600_000}))[2]
    assert more.verdict == NOT_APPLICABLE and any("× 1.120 the parameters" in item for item in more.left_out)
    assert (
        judge(full_runs() + low_runs([0.97, 0.97, 0.98, 0.97], summary={"params/total": 5_000_000}))[
            2
        ].verdict
        == NOT_APPLICABLE
    )


def test_tied_layers_make_a_run_deeper():
    tied = low_runs(
        [0.970, 0.975, 0.972, 0.971],
        summary={"params/total": 4_950_000},
        flags={"layer_map": "0,0,1,1,2,2,3,3"},
    )
    assert judge(full_runs() + tied)[2].verdict == SUPPORTED
    # as deep
    assert judge(full_runs(flags={"layer_map": "0,0,1,1,2,2,3,3"}) + tied)[2].verdict == NOT_APPLICABLE


def test_h3_is_held_against_the_best_full_rank_shape():
    deep = low_runs([0.985, 0.987, 0.986, 0.985], depth=8, summary={"params/total": 5_000_000})
    better = full_runs([p * 0.95 for p in FULL], depth=5)
    h3 = judge(full_runs() + better + deep)[2]
    assert h3.verdict == NOT_SUPPORTED and "5 layers" in h3.cases[0].baseline


def test_one_pair_decides_nothing():
    h1, h2, _ = judge(full_runs()[:1] + low_runs([1.0])[:1])
    assert h1.verdict == h2.verdict == UNDECIDED
    assert h2.cases[0].estimates[0].low is None and h2.cases[0].seeds_needed == 1
    assert "at least 1 more seed needed" in conclusion(h2)


def test_an_estimate_on_the_margin_asks_for_no_absurd_number():
    _, h2, _ = judge(full_runs() + low_runs([1.04, 1.06, 1.03, 1.0701]))
    assert h2.verdict == UNDECIDED and h2.cases[0].seeds_needed is None
    assert f"more than {MAX_SEEDS} seeds" in conclusion(h2) and f"over {MAX_SEEDS}" in text_of([h2])


def test_the_best_of_many_configurations_is_not_enough():
    """A small gap is enough for one comparison, but not for one of twenty. A clear gap is, and is named."""

    def many(gap, count):
        rng = np.random.default_rng(3)
        noise = [list(np.exp(rng.normal(math.log(1.05), 0.03, 4))) for _ in range(count - 1)]
        return (
            full_runs()
            + low_runs(gap, rank=8)
            + [r for i, ratios in enumerate(noise) for r in low_runs(ratios, rank=16 + i)]
        )

    near = [1.030, 1.018, 1.012, 1.028]
    clear = [1.0100, 1.0102, 1.0101, 1.0099]
    assert judge(many(near, 1))[1].verdict == SUPPORTED
    h2 = judge(many(near, 20))[1]
    assert h2.verdict == UNDECIDED
    assert h2.case_confidence == pytest.approx(1 - 0.05 / 20)
    assert len(h2.cases) == 20
    h2 = judge(many(clear, 20))[1]
    assert h2.verdict == SUPPORTED
    assert [line.name for line in h2.cases if line.verdict == SUPPORTED] == ["attn 8, mlp 8"]
    assert "Shown for 1 of 20: attn 8, mlp 8 (perplexity × 1.010)" in conclusion(h2)


def test_noise_is_seldom_called_supported():
    """Ten configurations at the margin, over one noisy baseline: at most 5 % of such sweeps are supported."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(400):
        base = rng.normal(0, 0.01, 4)
        gaps = [rng.normal(math.log(1.05), 0.01, 4) - base for _ in range(10)]
        comparisons = [Comparison("perplexity", dict(enumerate(gap)), 1.05) for gap in gaps]
        cases = [Case("low", "full", [comparison]) for comparison in comparisons]
        hypothesis = judge_claim(Claim("H2", "", "", ""), (cases, []), [], 0.95)
        if hypothesis.verdict == SUPPORTED:
            wrong += 1
    assert wrong / 400 <= 0.05


# ---- pairing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"derived": {"num_iterations": 200}},
        {"derived": {"total_batch_size": 8192}},
        {"flags": {"warmdown_ratio": 0.2}},
        {"width": 320},
        {"corpus": {"train_fingerprint": "other"}},
        {"device": {"dtype": "bfloat16"}},
    ],
)
def test_unlike_runs_are_not_paired(change):
    h1, h2, _ = judge(full_runs() + low_runs([1.0, 1.01, 1.02, 1.0], **change))
    assert h1.verdict == h2.verdict == NOT_APPLICABLE
    assert any("attn 64, mlp 64" in item and "differs in" in item for item in h2.left_out)


@pytest.mark.parametrize(
    "change",
    [
        {"device": {"name": "M2"}},
        {"device": {"threads": 1}},
        {"device": {"processes": 2}},
        {"flags": {"device_batch_size": 8}},
        {"flags": {"compile": "on"}},
    ],
)
def test_times_of_unlike_machines_are_not_compared_but_perplexities_are(change):
    h1, h2, _ = judge(full_runs() + low_runs([1.020, 1.022, 1.019, 1.021], **change))
    assert h1.verdict == NOT_APPLICABLE and h2.verdict == SUPPORTED


def test_pairs_are_by_seed_and_runs_of_one_seed_count_once():
    low = low_runs([1.02, 1.04, 1.03, 1.01])
    again = a_run(
        "again", 1, attn=64, mlp=64, ppl=FULL[0] * 1.06, summary=low[0].summary | {"val/ppl": FULL[0] * 1.06}
    )
    _, h2, _ = judge(full_runs()[:3] + low + [again])
    (e,) = h2.cases[0].estimates
    assert list(e.comparison.differences) == [1, 2, 3]
    assert e.comparison.differences[1] == pytest.approx(math.log(math.sqrt(1.02 * 1.06)))
    assert "seed 4 has no full-rank run" in text_of([h2])


def test_h2_is_about_both_attention_and_mlp():
    only = [a_run(f"a{s}", s, attn=64, ppl=p) for s, p in enumerate(FULL, 1)]
    h1, h2, _ = judge(full_runs() + only)
    assert h2.verdict == NOT_APPLICABLE and len(h1.cases) == 1


def test_unfinished_and_shortened_runs_are_left_out_and_listed():
    low = low_runs([1.02, 1.04, 1.03, 1.01])
    low[0].summary["status"] = "stopped"
    low[1].summary["total_tokens"] = 4096  # --stop-at-ppl
    h1, h2, _ = judge(full_runs() + low)
    assert list(h2.cases[0].estimates[0].comparison.differences) == [3, 4]
    assert list(h1.cases[0].estimates[0].comparison.differences) == [2, 3, 4]
    assert "low64_1: stopped, not finished" in h2.left_out
    assert "low64_2: ended before all of its tokens" in " ".join(h2.left_out)


def test_no_runs_to_speak_of():
    for runs in (full_runs(), low_runs([1.0, 1.0, 1.0, 1.0]), []):
        hypotheses = judge(runs)
        assert [h.verdict for h in hypotheses] == [NOT_APPLICABLE] * 3
        assert "it needs finished low-rank" in text_of(hypotheses)


# ---- tuning ------------------------------------------------------------------------------------------------


def at_rate(runs, rate, factor):
    for run in runs:
        run.config["derived"]["matrix_lr"] = rate
        run.summary["val/ppl"] *= factor
    return runs


def test_best_tuned_against_best_tuned():
    """Full rank is better at a rate of its own: low rank is compared with that one."""
    runs = at_rate(full_runs(), 0.04, 1.10) + at_rate(full_runs(), 0.02, 1.0)
    low = at_rate(low_runs([1.08, 1.081, 1.079, 1.08]), 0.04, 1.0) + at_rate(
        low_runs([1.08, 1.081, 1.079, 1.08]), 0.02, 1.05
    )
    _, h2, _ = judge(runs + low)
    (line,) = h2.cases
    assert line.estimates[0].ratio == pytest.approx(1.08, abs=1e-3) and line.verdict == NOT_SUPPORTED
    assert "2 settings were tried on each side (matrix lr)" in text_of([h2])


def test_uneven_tuning_is_said():
    runs = at_rate(full_runs(), 0.04, 1.0) + at_rate(full_runs(), 0.02, 1.1) + at_rate(full_runs(), 0.08, 1.1)
    _, h2, _ = judge(runs + low_runs([1.02, 1.021, 1.02, 1.019]))
    assert (
        "uneven tuning: 3 settings for full rank, 1 for low rank (matrix lr); that favours full rank"
        in text_of([h2])
    )


def test_seeds_that_served_to_choose_are_not_counted():
    scan = [
        run for rate, factor in ((0.02, 1.1), (0.08, 1.05)) for run in at_rate(full_runs()[:1], rate, factor)
    ]
    _, h2, _ = judge(full_runs() + scan + low_runs([1.02, 1.021, 1.02, 1.019]))
    assert list(h2.cases[0].estimates[0].comparison.differences) == [
        2,
        3,
        4,
    ]
    assert "seed 1 served to choose" in text_of([h2])
    _, h2, _ = judge(full_runs()[:1] + scan + low_runs([1.02])[:1])
    (e,) = h2.cases[0].estimates
    assert (e.ratio, e.low, e.seeds_needed) == (
        pytest.approx(1.02),
        None,
        2,
    )
    assert "which flatters them" in text_of([h2])


def test_a_run_that_diverged_is_not_averaged_away():
    low = low_runs([1.02, 1.021, 1.02, 1.019])
    low[2].summary["val/ppl"] = math.nan
    _, h2, _ = judge(full_runs() + low)
    assert h2.verdict == UNDECIDED and "seed 3 diverged" in text_of([h2])


# ---- memory ------------------------------------------------------------------------------------------------


def test_on_a_gpu_the_measured_peak_decides():
    gpu = {"device": {"type": "cuda", "name": "H100"}}
    h1 = judge(full_runs(**gpu) + low_runs([1.0] * 4, summary={"mem/peak_bytes": 700e6}, **gpu))[0]
    assert h1.verdict == NOT_SUPPORTED
    assert [e.comparison.quantity for e in h1.cases[0].estimates if e.comparison.limit] == [
        "time per step",
        "measured peak memory",
    ]


def test_on_a_cpu_the_prediction_decides_unless_the_measurement_contradicts_it():
    def with_peaks(*peaks):
        low = low_runs([1.0] * 4)
        for run, peak in zip(low, peaks):
            run.summary["mem/peak_bytes"] = peak
        return judge(full_runs() + low)[0]

    assert with_peaks(580e6, 620e6, 590e6, 615e6).verdict == SUPPORTED
    contradicted = with_peaks(700e6, 701e6, 702e6, 700e6)
    assert contradicted.verdict == UNDECIDED and "says the contrary" in text_of([contradicted])
    assert "disagree" in conclusion(contradicted)
    without = full_runs() + low_runs([1.0] * 4)
    for run in without:
        del run.summary["mem/predicted_peak_bytes"]
    assert judge(without)[0].cases[0].estimates[1].comparison.quantity == "measured peak memory"


# ---- bad input, and the page -------------------------------------------------------------------------------


def test_mixed_texts_and_tokenizers_are_refused():
    with pytest.raises(
        InputError, match=r"full1, full2, full3, full4 / low64_1.*tokenizer.*bits per byte \(val/bpb\) do"
    ):
        judge(full_runs() + low_runs([1.0] * 4, derived={"tokenizer_hash": "dd"}))
    with pytest.raises(InputError, match="not of one validation text"):
        judge(full_runs() + low_runs([1.0] * 4, corpus={"val_fingerprint": "dd"}))
    unfinished = low_runs([1.0], derived={"tokenizer_hash": "dd"}, summary={"status": "stopped"})
    assert judge(full_runs() + unfinished)[1].verdict == NOT_APPLICABLE


@pytest.mark.parametrize(
    "margins, flag",
    [
        ({"margin_time": 1.0}, "--margin-time 1"),
        ({"margin_memory": -0.1}, "--margin-memory -0.1"),
        ({"margin_ppl": math.nan}, "--margin-ppl nan"),
        ({"confidence": 95}, "--confidence 95"),
        ({"equal_params": 2}, "--equal-params 2"),
    ],
)
def test_a_margin_out_of_range_names_its_flag(margins, flag):
    with pytest.raises(InputError, match=flag):
        judge(full_runs(), **margins)


def test_blocks_render():
    hypotheses = judge(
        full_runs()
        + low_runs([1.02, 1.021, 1.02, 1.019])
        + low_runs([0.97, 0.98, 0.97, 0.99], depth=8, summary={"params/total": 5e6})
    )
    blocks = verdict_blocks(hypotheses)
    assert blocks[0] == ("heading", "The verdict")
    assert [b[1] for b in blocks if b[0] == "subheading"][:3] == [
        "H1: supported",
        "H2: supported",
        f"H3: {hypotheses[2].verdict}",
    ]
    text = to_markdown(blocks)
    assert "| perplexity " in text
    assert "below 1.05" in text
    assert "4 (1, 2, 3, 4)" in text
    assert "Bonferroni" in text
    assert "nan" not in text and "None" not in text and "Left out" in text
    assert to_page("verdict", blocks, {})


def test_ranks_that_spare_no_parameters_do_not_speak_for_h2():
    runs = [
        a_run(
            f"{name}{seed}",
            seed=seed,
            attn=rank,
            mlp=rank,
            ppl=30 + seed / 100,
            summary={"params/total": params},
        )
        for seed in (1, 2, 3)
        for name, rank, params in (
            ("full", 0, 5_000_000),
            ("large", 160, 5_000_000),
            ("small", 32, 3_000_000),
        )
    ]
    h2 = verdict(configurations(runs))[1]
    assert [line.name for line in h2.cases] == ["attn 32, mlp 32"]
    assert h2.cases[0].baseline.endswith("parameters × 0.600")
    assert any("attn 160, mlp 160: spares nothing, it has × 1.000" in item for item in h2.left_out)


@pytest.mark.parametrize("flags", [{"factor_act": "silu"}, {"matrix_ranks": "v=128"}])
def test_another_kind_of_low_rank_is_a_comparison_of_its_own_and_no_tuning(flags):
    plain = low_runs([1.020, 1.022, 1.019, 1.021])
    other = low_runs([1.010, 1.012, 1.009, 1.011], tag="other", flags=flags)
    h2 = judge(full_runs() + plain + other)[1]
    assert sorted(line.estimates[0].ratio for line in h2.cases) == pytest.approx([1.0105, 1.0205], abs=1e-3)


@pytest.mark.parametrize(
    "mlp,ranks,speaks",
    [
        (64, "k=0.25,q=0.25", True),
        (0, "q=64,up=64", True),
        (64, "", False),
        (64, "q=0", False),
        (0, "q=64", False),
        (0, "q=0/64,up=64/0", True),
        (64, "q=0/0,v=full", False),
    ],
)
def test_h2_wants_a_factored_matrix_in_attention_and_one_in_the_mlp(mlp, ranks, speaks):
    low = [
        a_run(
            f"low{s}",
            s,
            mlp=mlp,
            ppl=1.02 * p,
            flags={"matrix_ranks": ranks},
            summary={"params/total": 4_000_000},
        )
        for s, p in enumerate(FULL, 1)
    ]
    assert len(judge(full_runs() + low)[1].cases) == speaks


def test_an_interval_of_many_powers_of_ten_is_only_said_to_be_wide():
    assert [ratio_text(ratio) for ratio in (1e30, 1.5, 0.02, 1e-9, None)] == [
        "over 1000",
        "1.5000",
        "0.0200",
        "under 0.001",
        "–",
    ]
