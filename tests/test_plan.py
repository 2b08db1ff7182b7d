"""From flags to a plan: width, horizon, batch and learning rates."""

import pytest
from conftest import TINY

from nanochat import optim
from nanochat.accounting import account
from nanochat.budget import choose_model
from nanochat.errors import InputError
from nanochat.flags import build_parser
from nanochat.plan import model_config, take_device_batch, training_plan
from scripts import base_train


def plan_of(*flags, vocab=300, world_size=1):
    args = build_parser().parse_args([*TINY, *map(str, flags)])
    config = model_config(args, vocab)
    return config, training_plan(args, config, world_size)


def test_width_follows_depth_in_whole_heads_unless_given():
    args = build_parser().parse_args(["--depth", "5", "--aspect-ratio", "60", "--head-dim", "128"])
    assert model_config(args, 300).n_embd == 384
    assert plan_of("--model-dim", 64)[0].n_embd == 64


def test_horizon_is_the_first_that_is_given():
    config, plan = plan_of("--num-iterations", -1, "--target-param-data-ratio", 10)
    matrices = 2 * 12 * 32 * 32 + 300 * 32
    assert plan["num_iterations"] == round(10 * matrices / 256)
    flops = 6 * matrices + 12 * 32 * (16 + 32)
    assert plan_of("--num-iterations", -1, "--target-flops", 256 * flops * 7)[1]["num_iterations"] == 7
    assert plan_of("--num-iterations", 9, "--target-flops", 256 * flops * 7)[1]["num_iterations"] == 9


ARMS = [
    ("--attn-rank", 4, "--mlp-rank", 0.25),
    ("--lm-head-rank", 4),
    ("--attn-rank-schedule", "8,4"),
    ("--mlp-rank", 8, "--matrix-ranks", "v=0,q=2/4", "--factor-act", "silu"),
]


@pytest.mark.parametrize(
    "horizon",
    [("--target-param-data-ratio", 2000), ("--target-param-data-ratio", 30, "--total-batch-size", 256)],
)
@pytest.mark.parametrize(
    "shape", [(), ("--tie-embeddings",), ("--mlp-ratio", 2, "--layer-map", "0,0,1", "--n-kv-head", 1)]
)
def test_a_run_of_other_ranks_takes_the_steps_the_batch_and_the_rate_of_full_rank(shape, horizon):
    free = (*shape, "--num-iterations", -1, "--total-batch-size", -1, *horizon)
    full = plan_of(*free)[1]
    for ranks in ARMS:
        if not ("--tie-embeddings" in shape and "--lm-head-rank" in ranks):
            assert plan_of(*free, *ranks)[1] == full
    own = plan_of(*free, *ARMS[0], "--horizon-from", "own")[1]
    assert own["tokens"] < 0.8 * full["tokens"] and plan_of(*free, "--horizon-from", "own")[1] == full


def test_d20_and_its_low_rank_arm_differ_in_rank_alone():
    def plan(*ranks):
        args = build_parser().parse_args(["--depth", "20", *ranks])
        return training_plan(args, model_config(args, 65536), 1)

    full = plan()
    keys = ("num_iterations", "total_batch_size", "matrix_lr")
    assert [full[key] for key in keys] == [5460, 1048576, pytest.approx(0.0266, abs=5e-5)]
    assert plan("--attn-rank", "128", "--mlp-rank", "128") == full
    own = plan("--attn-rank", "128", "--mlp-rank", "128", "--horizon-from", "own")
    assert [own[key] for key in keys] == [3270, 524288, pytest.approx(0.0315, abs=5e-5)]


def test_flops_that_are_given_are_the_models_own_and_the_batch_is_full_ranks():
    free = ["--num-iterations", -1, "--total-batch-size", -1]
    free += ["--target-param-data-ratio", 2000, "--target-flops", 1e12]
    full, full_plan = plan_of(*free)
    low, low_plan = plan_of(*free, *ARMS[0])
    assert low_plan["total_batch_size"] == full_plan["total_batch_size"]
    assert low_plan["num_iterations"] > full_plan["num_iterations"]
    for config, plan in ((full, full_plan), (low, low_plan)):
        assert plan["tokens"] * account(config)["flops/per_token"] == pytest.approx(1e12, rel=0.05)


def test_of_a_solved_depth_the_horizon_is_that_of_the_solved_shape():
    free = ["--num-iterations", "-1", "--target-param-data-ratio", "2000", "--total-batch-size", "-1"]
    budget = ["--mlp-rank", "4", "--budget-params", "60_000", "--solve", "depth"]
    args = build_parser().parse_args([*TINY, *free, *budget])
    config = choose_model(args, 300)
    assert config.n_layer > 2
    assert training_plan(args, config, 1) == plan_of(*free, "--depth", config.n_layer)[1]


@pytest.mark.parametrize(
    "flags, words",
    [
        ((), ""),
        (
            ("--total-batch-size", -1),
            "tokens a step from 12 tokens a matrix parameter of the full-rank model of "
            "this shape (--horizon-from full)",
        ),
        (
            ("--num-iterations", -1, "--horizon-from", "own"),
            "steps from 12 tokens a matrix parameter of this model (--horizon-from own)",
        ),
        (
            ("--num-iterations", -1, "--target-flops", 1e12),
            "steps from --target-flops 1e+12 at this model's FLOPs",
        ),
    ],
)
def test_a_dry_run_says_where_its_horizon_comes_from(flags, words, capsys):
    base_train.main([*TINY, "--vocab-size", "300", "--dry-run", *map(str, flags)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("horizon: ")]
    assert lines == ([f"horizon: {words}"] if words else [])


def test_batch_chosen_for_the_user_grows_with_the_horizon_and_divides():
    small = plan_of("--total-batch-size", -1, "--target-param-data-ratio", 1000)[1]["total_batch_size"]
    large = plan_of("--total-batch-size", -1, "--target-param-data-ratio", 100000)[1]["total_batch_size"]
    assert small < large and small % (4 * 32) == large % (4 * 32) == 0
    assert plan_of("--total-batch-size", -1, world_size=3)[1]["total_batch_size"] % (3 * 4 * 32) == 0


def test_learning_rate_schedule_by_hand():
    lr = [optim.lr_multiplier(s, 10, warmup=2, warmdown_ratio=0.4, final=0.1) for s in range(10)]
    assert lr == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325])


def test_matrix_learning_rate_follows_the_number_of_steps_unless_given():
    def rate(*flags):
        return plan_of(*flags)[1]["matrix_lr"]

    assert rate("--num-iterations", 50) == rate("--num-iterations", 200) == 0.08
    assert rate("--num-iterations", 1600) == pytest.approx(0.08 / 2)
    assert rate("--num-iterations", 14000) == rate("--num-iterations", 10**6) == 0.02
    assert rate("--matrix-lr", 0.01) == 0.01


def test_a_device_batch_is_what_memory_allows_and_divides():
    def plan(rows, processes, most):
        flags = ["--total-batch-size", rows * 32, "--device-batch-size", most]
        return plan_of(*flags, world_size=processes)[1]

    assert [plan(256, 16, most)["device_batch_size"] for most in (32, 16, 15, 5)] == [16, 16, 8, 4]
    assert plan(256, 8, 32)["device_batch_size"] == 32 and plan(2, 2, 32) == plan(2, 2, 1)
    six = plan(36, 6, 4)
    assert (six["device_batch_size"], six["grad_accum_steps"], six["total_batch_size"]) == (3, 2, 36 * 32)
    message = (
        r"^--total-batch-size 8192: not a multiple of --max-seq-len 32 × 6 process\(es\) = 192; "
        "nearest: 8064 or 8256$"
    )
    with pytest.raises(InputError, match=message):
        plan(256, 6, 32)


def test_two_nodes_of_eight_processes_share_the_batch_of_one(capsys):
    flags = ["--depth", 1, "--model-dim", 128, "--head-dim", 128, "--max-seq-len", 2048]
    flags += ["--device-batch-size", 32, "--total-batch-size", 524288]
    args = build_parser().parse_args([*TINY, *map(str, flags)])
    plan = training_plan(args, model_config(args, 300), 16)
    take_device_batch(args, plan, 16)
    assert args.device_batch_size == 16 and plan["grad_accum_steps"] == 1
    assert capsys.readouterr().out == (
        "--device-batch-size 32: taking 16, the largest that divides 524,288 "
        "tokens a step of 2048 × 16 process(es)\n"
    )


@pytest.mark.parametrize("words", [[], ["--"]])
def test_flags_after_two_dashes_are_ours(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["base_train.py", *words, "--run", "mine"])
    assert build_parser().parse_args().run == "mine"
    assert build_parser().parse_args([*words, "--run", "mine"]).run == "mine"
