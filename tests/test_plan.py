"""From flags to a plan: width, horizon, batch and learning rates."""
import pytest

from conftest import TINY
from nanochat import training
from nanochat.common import InputError
from nanochat.flags import build_parser
from nanochat.plan import model_config, take_device_batch, training_plan


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


def test_a_device_batch_is_what_memory_allows_and_divides():
    def plan(rows, processes, most):
        flags = ["--total-batch-size", rows * 32, "--device-batch-size", most]
        return plan_of(*flags, world_size=processes)[1]

    assert [plan(256, 16, most)["device_batch_size"] for most in (32, 16, 15, 5)] == [16, 16, 8, 4]
    assert plan(256, 8, 32)["device_batch_size"] == 32 and plan(2, 2, 32) == plan(2, 2, 1)
    six = plan(36, 6, 4)
    assert (six["device_batch_size"], six["grad_accum_steps"], six["total_batch_size"]) == (3, 2, 36 * 32)
    said = r"^--total-batch-size 8192: not a multiple of --max-seq-len 32 × 6 process\(es\) = 192; nearest: 8064 or 8256$"
    with pytest.raises(InputError, match=said):
        plan(256, 6, 32)


def test_two_nodes_of_eight_processes_share_the_batch_of_one(capsys):
    flags = ["--depth", 1, "--model-dim", 128, "--head-dim", 128, "--max-seq-len", 2048,
             "--device-batch-size", 32, "--total-batch-size", 524288]
    args = build_parser().parse_args([*TINY, *map(str, flags)])
    plan = training_plan(args, model_config(args, 300), 16)
    take_device_batch(args, plan, 16)
    assert args.device_batch_size == 16 and plan["grad_accum_steps"] == 1
    assert capsys.readouterr().out == ("--device-batch-size 32: taking 16, the largest that divides 524,288 tokens a step "
                                       "of 2048 × 16 process(es)\n")


@pytest.mark.parametrize("words", [[], ["--"]])
def test_flags_after_two_dashes_are_ours(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["base_train.py", *words, "--run", "mine"])
    assert build_parser().parse_args().run == "mine"
    assert build_parser().parse_args([*words, "--run", "mine"]).run == "mine"
