"""The table at equal cost: what is subtracted from what, against numbers worked out by hand."""

import math

import pytest
from test_configurations import a_run

from nanochat.report.configurations import configurations
from nanochat.report.equal_cost import equal_cost_table
from nanochat.report.page import to_markdown

PERPLEXITY = [30.0, 31.0, 29.0]


def trained(tag, nats, steps=100, flops=1e15, seconds=50.0, seeds=(1, 2, 3), **changes):
    """Runs of `nats` more than the control's loss, seed by seed."""
    summary = {
        "total_tokens": 4096 * steps,
        "total_training_flops": flops,
        "total_training_time": seconds,
        "flops/per_token": flops / steps,
        "params/attention": 1_000_000,
        "params/mlp": 2_000_000,
        **changes.pop("summary", {}),
    }
    derived = {"num_iterations": steps, "tokens": 4096 * steps, **changes.pop("derived", {})}
    return [
        a_run(
            f"{tag}_{s}",
            s,
            ppl=PERPLEXITY[s - 1] * math.exp(nats),
            summary=summary,
            derived=derived,
            **changes,
        )
        for s in seeds
    ]


def low(nats, **changes):
    return trained(f"low{changes.get('steps', 100)}", nats, attn=64, mlp=64, **changes)


HALF = {"params/attention": 500_000, "params/mlp": 1_000_000}


def cells(runs) -> dict[str, list[str]]:
    """{model: its cells} of the table."""
    blocks = equal_cost_table(configurations(runs))
    return {row[0]: row[1:] for row in blocks[-1][2]} if blocks else {}


def test_each_cost_by_itself():
    runs = (
        trained("full", 0.0)
        + low(0.05, flops=6e14, seconds=40, summary=HALF)
        + low(-0.10, steps=200, flops=1.2e15, seconds=80, summary=HALF)
    )
    ((name, (blocks, flops, *found)),) = cells(runs).items()
    assert (name, blocks, flops) == ("attn 64, mlp 64", "× 0.500", "× 0.600")
    # as much more of it as the control had
    expected = [0.05 - 0.15 * math.log(more) / math.log(2) for more in (1, 1 / 0.6, 50 / 40)]
    assert found == [f"{nats:+.3f} ± 0.000 (3)".replace("-", "−") for nats in expected]
    assert "Loss minus that of full rank" in to_markdown(equal_cost_table(configurations(runs)))


def test_no_cell_outside_of_what_was_run():
    ((_, _, _, equal_flops, time),) = cells(trained("full", 0.0) + low(0.05, flops=6e14, seconds=40)).values()
    assert (equal_flops, time) == ("–", "–")
    (near,) = cells(trained("full", 0.0) + low(0.05, flops=0.99e15, seconds=60)).values()
    assert near[3] == "+0.050 ± 0.000 (3)" and near[4] == "–"


def test_the_interval_is_over_the_seeds_of_both():
    runs = (
        trained("full", 0.0, seeds=(1, 2))
        + low(0.05, seeds=(1,))
        + low(0.07, seeds=(2,))
        + low(0.5, seeds=(3,))
    )
    cell = next(iter(cells(runs).values()))[2]
    half = 12.7062 * 0.02 / math.sqrt(2) / math.sqrt(2)  # t(1) · sd / √n
    assert cell == f"+0.060 ± {half:.3f} (2)"


def test_the_control_is_the_largest_full_rank_model_at_its_shortest_length():
    small = trained("small", -0.2, depth=2, summary={"params/total": 3_000_000, **HALF})
    longer = trained("longer", -0.3, steps=200, flops=2e15, seconds=100)
    rows = cells(trained("full", 0.0) + longer + small + low(0.05))
    assert set(rows) == {"full rank, 2 layers", "attn 64, mlp 64, 4 layers"}
    assert rows["full rank, 2 layers"][2] == "−0.200 ± 0.000 (3)"


def test_a_rate_chosen_on_the_seed_compared_is_not_counted():
    def rates(side, **rank):
        return [
            run
            for rate, nats in ((0.04, side), (0.08, side + 0.2))
            for run in trained(f"{side}{rate}", nats, seeds=(1,), derived={"matrix_lr": rate}, **rank)
        ]

    runs = (
        rates(0.0)
        + rates(0.05, attn=64, mlp=64)
        + trained("full", 0.0, seeds=(2, 3))
        + low(0.03, seeds=(2, 3))
    )
    assert next(iter(cells(runs).values()))[2] == "+0.030 ± 0.000 (2)"


@pytest.mark.parametrize(
    "runs",
    [[], trained("full", 0.0), low(0.05), trained("full", 0.0) + low(0.1, flags={"warmdown_ratio": 0.3})],
)
def test_nothing_to_compare(runs):
    assert equal_cost_table(configurations(runs)) == [] if runs else cells(runs) == {}
