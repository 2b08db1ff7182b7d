"""Real processes on gloo give the single-process run. torchrun itself: test_ending.py, test_commands.py."""

import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import TINY, losses
from processes import Launched

from nanochat import metrics
from nanochat.checkpoint_manager import load_checkpoint, saved_steps
from nanochat.parallel import differing_parameters
from nanochat.processes import World
from scripts import base_train

FLAGS = ["--eval-every", "25", "--device-batch-size", "2", "--total-batch-size", "384"]  # 12 rows a step


@pytest.fixture
def train_on(base_dir, corpus_dir):
    """train_on(processes, '--flag', value, …) trains a tiny model: (exit codes, what they printed)."""

    def run(processes, *flags):
        output = base_dir.parent / "output"
        output.unlink(missing_ok=True)
        launched = Launched(
            processes, output, base_train.main, [*TINY, "--data", str(corpus_dir), *FLAGS, *flags]
        )
        return launched.codes(), output.read_text()

    return run


def optimizer_shapes(state) -> dict:
    """{(parameter, entry of its optimizer state): shape}."""
    return {
        (name, key): tuple(tensor.shape)
        for name, entries in state["optimizer"].items()
        for key, tensor in entries.items()
    }


@pytest.mark.parametrize(
    "processes,steps,flags",
    [
        (2, 25, ["--device-batch-size", "6"]),
        # ranks, tables and scalars that 3 does not divide
        (3, 25, ["--device-batch-size", "4", "--attn-rank", "0.3", "--mlp-rank", "5", "--grad-clip", "1.0"]),
        # three micro-steps on each. At higher rates the losses agree too, but a table's entry whose
        # gradient is a rounding error moves in another way.
        (4, 25, ["--device-batch-size", "1", "--value-embeddings", "--matrix-lr", "0.04"]),
    ],
)
def test_many_processes_give_the_losses_of_one(train, train_on, processes, steps, flags):
    flags = ["--num-iterations", str(steps), *flags]
    codes, output = train_on(processes, *flags, "--model-tag", "many")
    assert not any(codes), output[-2000:]  # it also ends with the parameters of all compared to the bit
    many = metrics.load_run(metrics.runs_dir() / "many")
    one = train(*FLAGS, *flags, "--device-batch-size", 6, tag="one")
    assert len(losses(many)) == steps and many.config["device"]["processes"] == processes
    assert np.abs(np.subtract(losses(many), losses(one))).max() < 1e-4
    assert many.summary["val/loss"] == pytest.approx(one.summary["val/loss"], abs=1e-4)
    assert many.summary["val/bpb"] == pytest.approx(one.summary["val/bpb"], abs=1e-4)
    # rank 0 holds its share of the optimizer state; the checkpoint holds all of it, as one process writes it
    assert many.summary["mem/optimizer_bytes"] < one.summary["mem/optimizer_bytes"] * (1 / processes + 0.15)
    a, b = (load_checkpoint(metrics.runs_dir() / tag, steps)[0] for tag in ("many", "one"))
    shapes = [optimizer_shapes(state) for state in (a, b)]
    assert shapes[0] == shapes[1]
    for name, weight in b["model"].items():
        np.testing.assert_allclose(a["model"][name], weight, atol=0.02, err_msg=name)


def cut_off_after(step: int, folder):
    """As if the run had been killed before its next checkpoint."""
    for later in (s for s in saved_steps(folder) if s > step):
        shutil.rmtree(folder / f"checkpoints/step_{later:06d}")
    (folder / "summary.json").write_text('{"status": "running"}')


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_processes_stop_and_resume_to_the_bit(train_on, dtype):
    flags = ["--num-iterations", "12", "--save-every", "4", "--keep", "-1", "--model-tag", "three"]
    flags += ["--dtype", dtype]
    assert train_on(3, *flags)[0] == [0, 0, 0]
    straight = metrics.load_run(metrics.runs_dir() / "three")
    cut_off_after(4, metrics.runs_dir() / "three")
    assert train_on(3, *flags, "--resume", "auto")[0] == [0, 0, 0]
    resumed = metrics.load_run(metrics.runs_dir() / "three")
    assert (metrics.runs_dir() / "three/metrics.jsonl").read_text().count(
        "\n"
    ) == 12 + 8  # it did run steps 5 to 12 again
    assert losses(straight) == losses(resumed) and straight.summary["val/loss"] == resumed.summary["val/loss"]


def test_a_run_goes_on_with_another_number_of_processes_and_batch_size(train, train_on):
    flags = ["--num-iterations", "18", "--save-every", "6", "--keep", "-1", "--mlp-rank", "8"]
    one = train(*FLAGS, *flags, "--device-batch-size", 12, tag="one")
    assert train_on(2, *flags, "--device-batch-size", "6", "--model-tag", "moved")[0] == [0, 0]
    cut_off_after(6, metrics.runs_dir() / "moved")
    moved = train(*FLAGS, *flags, "--device-batch-size", 3, "--resume", "auto", tag="moved")
    assert len(losses(moved)) == 18 and np.abs(np.subtract(losses(moved), losses(one))).max() < 1e-4
    cut_off_after(12, metrics.runs_dir() / "moved")
    assert train_on(3, *flags, "--device-batch-size", "2", "--model-tag", "moved", "--resume", "auto")[0] == [
        0,
        0,
        0,
    ]
    moved = metrics.load_run(metrics.runs_dir() / "moved")
    assert (
        np.abs(np.subtract(losses(moved), losses(one))).max() < 1e-4
        and moved.config["device"]["processes"] == 3
    )


def test_two_processes_in_bfloat16_train_like_one(train, train_on):
    """Their working weights have 8 bits, as the products of one process do; checkpoints hold all 24."""
    flags = ["--num-iterations", "25", "--save-every", "25", "--dtype", "bfloat16", "--value-embeddings"]
    codes, output = train_on(2, *flags, "--device-batch-size", "6", "--model-tag", "many")
    assert codes == [0, 0], output[-2000:]
    many = metrics.load_run(metrics.runs_dir() / "many")
    one = train(*FLAGS, *flags, "--device-batch-size", 12, tag="one")
    assert losses(many)[0] == pytest.approx(losses(one)[0], abs=1e-5)  # before any update
    assert np.abs(np.subtract(losses(many), losses(one))).max() < 0.02
    a, b = (load_checkpoint(metrics.runs_dir() / tag, 25)[0]["model"] for tag in ("many", "one"))
    assert {name: w.dtype for name, w in a.items()} == {name: w.dtype for name, w in b.items()}
    matrix = a["blocks.0.mlp.up.weight"]
    assert not torch.equal(matrix, matrix.bfloat16().float())  # the master, not the working weight
    share = many.summary["mem/weights_bytes"] / one.summary["mem/weights_bytes"]
    assert share == pytest.approx(2 / 4 + 1 / 2, abs=0.02)  # bfloat16 of all, float32 of a half


def assert_differences_are_found():
    dist.init_process_group("gloo")
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    world = World(torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    assert differing_parameters(model, world) == []
    model[1].weight.data[1, 2] += 1.2e-7 * dist.get_rank()
    assert differing_parameters(model, world) == ["1.weight"]


def test_processes_that_hold_different_parameters_are_found(tmp_path):
    assert Launched(2, tmp_path / "output", assert_differences_are_found).codes() == [0, 0], (
        tmp_path / "output"
    ).read_text()


def test_a_bad_flag_is_said_once(train_on):
    codes, output = train_on(2, "--total-batch-size", "300")
    assert codes[0] == 2
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "× 2 process(es) = 64; nearest: 256 or 320" in lines[0]
