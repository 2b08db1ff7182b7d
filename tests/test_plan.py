"""From flags to a plan: width, horizon, batch and learning rates."""
import pytest

from conftest import TINY
from nanochat import training
from nanochat.flags import build_parser
from nanochat.plan import model_config, training_plan


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


def test_batch_chosen_for_the_user_grows_with_the_horizon_and_divides():
    small = plan_of("--total-batch-size", -1, "--target-param-data-ratio", 1000)[1]["total_batch_size"]
    large = plan_of("--total-batch-size", -1, "--target-param-data-ratio", 100000)[1]["total_batch_size"]
    assert small < large and small % (4 * 32) == large % (4 * 32) == 0
    assert plan_of("--total-batch-size", -1, world_size=3)[1]["total_batch_size"] % (3 * 4 * 32) == 0


def test_learning_rate_schedule_by_hand():
    lr = [training.lr_multiplier(s, 10, warmup=2, warmdown_ratio=0.4, final=0.1) for s in range(10)]
    assert lr == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325])


def test_matrix_learning_rate_follows_the_number_of_steps_unless_given():
    rate = lambda *flags: plan_of(*flags)[1]["matrix_lr"]
    assert rate("--num-iterations", 50) == rate("--num-iterations", 200) == 0.08
    assert rate("--num-iterations", 1600) == pytest.approx(0.08 / 2) and rate("--num-iterations", 14000) == rate("--num-iterations", 10**6) == 0.02
    assert rate("--matrix-lr", 0.01) == 0.01
