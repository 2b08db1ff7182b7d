"""The figures of a sweep: which are drawn, where their points lie, and the numbers behind them."""

import io
import math
import statistics

import matplotlib.image
import pytest

from nanochat.metrics import Run
from nanochat.report import plotting
from nanochat.report.configurations import configurations
from nanochat.report.setting_figures import rate_lines
from nanochat.report.summaries import (
    any_diverged,
    baseline,
    error_bar_caption,
    frontier,
    outcome,
    spread,
    times_to_perplexity,
)
from nanochat.report.sweep_figures import draw_sweep_figures, figure_caption
from nanochat.report.time_figures import draw_thresholds, fastest_low_rank, mean_curve

RUN = {
    "depth": 4,
    "attn": 0,
    "mlp": 0,
    "lr": 0.02,
    "ppl": 20.0,
    "params": 5e6,
    "seconds": 100.0,
    "reach": 30.0,  # seconds to perplexity 30; None: not reached
    "device": "EPYC",
}


def run(name, seed=1, **given):
    """A finished run with the values of RUN, but for those given; what else is given are flags.

    Its loss falls along a straight line in time; it is evaluated four times.
    """
    values = RUN | given
    depth = values["depth"]
    ppl = values["ppl"]
    seconds = values["seconds"]
    history = [
        {
            "step": 25 * i,
            "total_training_time": seconds * i / 4,
            "total_tokens": 1000 * i,
            "train/dt": seconds / 100,
            "val/loss": math.log(ppl) * (1 + 0.1 * (4 - i)),
            "val/bpb": 1.0,
            "val/ppl": ppl ** (1 + 0.1 * (4 - i)),
        }
        for i in range(1, 5)
    ]
    flags = {
        "depth": depth,
        "attn_rank": values["attn"],
        "mlp_rank": values["mlp"],
        "matrix_lr": values["lr"],
    }
    more_flags = {key: value for key, value in given.items() if key not in RUN}
    model = {"n_layer": depth, "n_embd": 256}
    model |= {f"{group}_ranks": [values[group]] * depth for group in ("attn", "mlp")}
    config = {
        "flags": {**flags, "seed": seed, **more_flags},
        "seed": seed,
        "derived": {
            "model": model,
            "matrix_lr": values["lr"],
            "corpus": {"val_fingerprint": "bb"},
            "tokenizer_hash": "cc",
        },
        "device": {"type": "cpu", "name": values["device"], "dtype": "float32", "processes": 1, "threads": 2},
    }
    summary = {
        "status": "finished",
        "val/ppl": ppl,
        "val/loss": math.log(ppl) if ppl > 0 else ppl,
        "val/bpb": ppl / 20,
        "params/total": values["params"],
        "mem/peak_bytes": 2 * values["params"] + 1e8,
        "total_training_time": seconds,
        "total_training_flops": 6e6 * values["params"],
    }
    if values["reach"] is not None:
        summary["time_to_ppl/30/seconds"] = values["reach"] + 5
        summary["time_to_ppl/30/seconds_interpolated"] = values["reach"]
    return Run(name, config, summary, history)


def full_and_low():
    return configurations(
        [run("full", ppl=20, params=5e6), run("low", attn=64, mlp=64, ppl=22, params=3e6, seconds=70)]
    )


# ---- numbers -----------------------------------------------------------------------------------------------


def test_spread_is_a_standard_deviation_the_range_of_two_or_nothing():
    low, high = spread([1.0, 2.0, 6.0])
    assert (low, high) == pytest.approx((3 - math.sqrt(7), 3 + math.sqrt(7)))  # (4 + 1 + 9) / 2 = 7
    assert spread([3.0, 1.0]) == (1.0, 3.0) and spread([2.0]) == (2.0, 2.0)


def test_outcome_and_the_error_bars_sentence_say_how_many_seeds():
    [three, two, one] = configurations(
        [
            run(f"{lr}_{s}", s, lr=lr, ppl=20 + s)
            for lr, n in ((1e-3, 3), (2e-3, 2), (3e-3, 1))
            for s in range(n)
        ]
    )
    assert [outcome(c, "val/ppl") for c in (three, two, one)] == ["21.00 ± 1.00", "20.00 to 21.00", "20.00"]
    words = error_bar_caption([three, two, one])
    for part in ("standard deviation", "two seeds", "one seed", "n = 1 to 3"):
        assert part in words
    assert "standard deviation" not in error_bar_caption([two]) and "n = 2 " in error_bar_caption([two])
    assert "n = 3 " in figure_caption("frontier.png", [three]) and "n = 3" not in figure_caption(
        "parameters.png", [three]
    )


def test_frontier_is_what_nothing_beats_and_holds_no_diverged_seed():
    cheap, bad, good = configurations(
        [
            run("cheap", attn=8, ppl=30, params=1e6),
            run("bad", attn=16, ppl=31, params=2e6),
            run("good", ppl=20, params=5e6),
        ]
    )
    front = frontier([good, bad, cheap], "params/total", "val/ppl")
    assert [c.runs[0].name for c in front] == ["cheap", "good"]
    lucky = configurations(
        [
            run("a", 1, attn=8, ppl=10, params=1e6),
            run("b", 2, attn=8, ppl=math.nan, params=1e6),
            run("good", ppl=20),
        ]
    )
    assert any_diverged(lucky[0], "val/ppl") and lucky[0].mean("val/ppl") == 10
    assert frontier(lucky, "params/total", "val/ppl") == lucky[1:]


def test_baseline_is_the_best_full_rank_configuration_of_those_with_most_seeds():
    configs = configurations(
        [
            run("a1", 1, lr=0.01, ppl=21),
            run("a2", 2, lr=0.01, ppl=21),
            run("b1", 1, lr=0.02, ppl=20.5),
            run("b2", 2, lr=0.02, ppl=20.5),
            run("c", 1, lr=0.04, ppl=19),
            run("low", attn=64, ppl=15),
        ]
    )
    assert baseline(configs, "val/ppl").runs[0].name == "b1"
    assert baseline(configs[-1:], "val/ppl") is None


def test_time_to_a_threshold_needs_every_seed():
    both, one = configurations(
        [
            run("a", 1, reach=30),
            run("b", 2, reach=40),
            run("c", 1, attn=8, reach=20),
            run("d", 2, attn=8, reach=None),
        ]
    )
    assert (
        times_to_perplexity(both, 30) == [30, 40]
        and times_to_perplexity(one, 30) == []
        and times_to_perplexity(both, 50) == []
    )
    assert fastest_low_rank([both, one], both) is None
    fast, slow = configurations([run("a", attn=8, reach=20, ppl=25), run("b", attn=16, reach=60)])
    assert fastest_low_rank([both, fast, slow], both) == (30, fast, 20, 35)


@pytest.mark.parametrize("flag", [{"matrix_ranks": "q=8"}, {"factor_act": "silu"}])
def test_time_against_rank_leaves_out_what_has_no_one_rank_or_is_not_linear(flag):
    runs = [run("full"), run("a", attn=8, reach=20), run("b", attn=16, reach=25)]
    assert draw_thresholds(configurations(runs), "loss")
    runs[2] = run("b", attn=16, reach=25, **flag)
    assert draw_thresholds(configurations(runs), "loss") is None


def test_mean_curve_is_over_seeds_at_the_evaluations_of_all():
    [config] = configurations([run("a", 1, ppl=20, seconds=100), run("b", 2, ppl=30, seconds=140)])
    config.runs[1].history.pop(0)
    curve = mean_curve(config, "val/loss")
    assert [t for t, _ in curve] == pytest.approx([60, 90, 120])
    assert curve[-1][1] == pytest.approx(statistics.fmean([math.log(20), math.log(30)]))


def test_along_a_line_of_learning_rates_nothing_else_varies():
    scan = [run(f"lr{lr}", lr=lr, embedding_lr=0.3) for lr in (0.04, 0.01, 0.02)]
    other = [run(f"e{lr}", lr=lr, embedding_lr=0.6, ppl=1) for lr in (0.01, 0.02)]  # better, but fewer rates
    configs = configurations(scan + other + [run("low", attn=8, embedding_lr=0.3)])
    configs += configurations([run("wild", lr=0.9, ppl=math.nan, embedding_lr=0.3)])
    [line] = rate_lines(configs, "matrix_lr", "val/ppl")
    assert [c.runs[0].name for c in line] == ["lr0.01", "lr0.02", "lr0.04", "wild"]  # its × is drawn
    assert [len(line) for line in rate_lines(configs, "embedding_lr", "val/ppl")] == [2]


def test_rates_are_compared_on_the_seeds_that_all_of_them_have():
    """Tuned on seed 0, the best rate then run on seeds 1 and 2, which are easier."""
    tuned = [
        run("a", 0, lr=0.01, ppl=21),
        run("b", 0, lr=0.02, ppl=20),
        run("b1", 1, lr=0.02, ppl=10),
        run("b2", 2, lr=0.02, ppl=10),
    ]
    [line] = rate_lines(configurations(tuned), "matrix_lr", "val/ppl")
    assert [c.mean("val/ppl") for c in line] == [21, 20]
    without_common_seed = configurations([*tuned, run("c", 3, lr=0.04, ppl=15)])
    [line] = rate_lines(without_common_seed, "matrix_lr", "val/ppl")
    assert [len(c.runs) for c in line] == [1, 3, 1]


# ---- which figures -----------------------------------------------------------------------------------------

ALWAYS = {"frontier.png", "loss_time.png"}
SIZES = {"loss_parameters.png", "parameters.png", "memory.png"}


LESS = {"attn": 64, "params": 4e6}
LEAST = {"attn": 32, "params": 3e6}
GRID = [dict(depth=d, attn=r, params=1e6 * d + 1e4 * r) for d in (4, 8) for r in (0, 64)]


@pytest.mark.parametrize(
    "runs, measure, names",
    [
        ([dict(lr=0.01), dict(lr=0.02)], "loss", ALWAYS | {"learning_rate.png"}),
        ([{}, LESS], "loss", ALWAYS | SIZES),
        ([{}, LESS, LEAST], "loss", ALWAYS | SIZES | {"threshold_rank.png"}),
        ([{}, LESS, LEAST], "bpb", ALWAYS | SIZES),  # thresholds are perplexities
        ([{}, {**LESS, "device": "Xeon"}], "loss", {"frontier.png"} | SIZES),  # times of two machines
        ([{}, LESS, dict(depth=8, params=9e6)], "loss", ALWAYS | SIZES),  # rank varies at one depth only
        (GRID, "loss", ALWAYS | SIZES | {"depth_rank.png"}),
    ],
)
def test_only_the_figures_that_the_axes_call_for(runs, measure, names, monkeypatch):
    monkeypatch.setattr("nanochat.report.plotting.png_with_hotspots", lambda fig, points: (b"", points))
    monkeypatch.setattr("nanochat.report.plotting.png", lambda fig: b"")
    runs = [run(f"r{i}", **values) for i, values in enumerate(runs)]
    assert draw_sweep_figures(configurations(runs), measure).keys() == names


def test_unfinished_and_diverged_runs_alone_make_no_figure():
    runs = [run("a", ppl=math.nan), run("b", attn=8)]
    runs[1].summary["status"] = "running"
    assert draw_sweep_figures(configurations(runs), "loss") == {}


# ---- places ------------------------------------------------------------------------------------------------


def test_hotspots_lie_on_the_points_of_the_saved_picture():
    configs = full_and_low()
    data, spots = draw_sweep_figures(configs, "loss")["frontier.png"]
    picture = matplotlib.image.imread(io.BytesIO(data))
    height, width, _ = picture.shape
    assert len(spots) == 8  # two configurations in four panels
    for x, y, text in spots:
        colour = plotting.configuration_styles(configs)[text.split("\n")[0]]["color"]
        pixel = picture[round(y * height), round(x * width), :3]
        assert pixel == pytest.approx([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)], abs=0.02), text
    text = next(text for _, _, text in spots if text.startswith("attn 64, mlp 64"))
    assert "22.00" in text and "3.00 M" in text and "seed 1" in text


def test_labels_cover_neither_each_other_nor_the_points():
    fig = plotting.new_figure(6, 4)
    panel = fig.subplots()
    points = [(x, 1 + 0.01 * x * (-1) ** x, f"configuration {x}, 4 layers") for x in range(8)]
    panel.plot([x for x, _, _ in points], [y for _, y, _ in points], "o")
    panel.set_ylim(0, 2)
    fig.draw_without_rendering()
    plotting.label_points(panel, points, [(x, y) for x, y, _ in points])
    fig.draw_without_rendering()
    boxes = [super(type(note), note).get_window_extent(fig.canvas.get_renderer()) for note in panel.texts]
    dots = [panel.transData.transform((x, y)) for x, y, _ in points]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    frame = panel.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_full_rank_is_black_and_many_ranks_keep_apart():
    runs = [run("full")]
    for rank in (8, 16, 32, 64):
        runs += [
            run(f"attn{rank}", attn=rank),
            run(f"mlp{rank}", mlp=rank),
            run(f"{rank}", attn=rank, mlp=rank),
        ]
    colours = [style["color"] for style in plotting.configuration_styles(configurations(runs)).values()]
    assert colours[0] == "#000000" and len(set(colours)) == 13


def test_full_rank_with_another_mlp_is_a_model_of_its_own():
    configs = configurations([run("full"), run("narrow", mlp_ratio=1.0), run("low", attn=8)])
    assert [c.name for c in configs] == ["full rank", "full rank, MLP × 1", "attn 8"]
    colours = [style["color"] for style in plotting.configuration_styles(configs).values()]
    assert colours[0] == "#000000" and len(set(colours)) == 3
