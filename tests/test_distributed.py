"""Real processes: torchrun on gloo gives the single-process run."""
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from conftest import TINY, losses
from nanochat import metrics
from nanochat.checkpoint_manager import load_checkpoint, saved_steps

FLAGS = ["--eval-every", "25", "--device-batch-size", "2", "--total-batch-size", "384"]  # 12 rows a step
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(processes: int, *arguments, launcher=("--standalone",)):
    return [sys.executable, "-m", "torch.distributed.run", *launcher, f"--nproc_per_node={processes}", *arguments]


def training(corpus_dir, *flags):
    return ["-m", "scripts.base_train", *TINY, "--data", str(corpus_dir), *FLAGS, *flags]


def torchrun(processes: int, corpus_dir, *flags):
    environment = {**ENVIRONMENT, "NANOCHAT_BASE_DIR": os.environ["NANOCHAT_BASE_DIR"]}
    return subprocess.run(command(processes, *training(corpus_dir, *flags)), capture_output=True, text=True, env=environment, timeout=240)


@pytest.mark.parametrize("processes,steps,flags", [
    (2, 100, []), (3, 100, ["--attn-rank", "0.3", "--mlp-rank", "5", "--grad-clip", "1.0"]),  # ranks, tables and scalars that 3 does not divide
    (4, 50, ["--device-batch-size", "1", "--value-embeddings"])])
def test_many_processes_give_the_losses_of_one(train, corpus_dir, processes, steps, flags):
    flags = ["--num-iterations", str(steps), *flags]
    done = torchrun(processes, corpus_dir, *flags, "--model-tag", "many")
    assert done.returncode == 0, done.stderr[-2000:]  # it also ends with the parameters of all compared to the bit
    many, one = metrics.load_run(metrics.runs_dir() / "many"), train(*FLAGS, *flags, tag="one")
    assert len(losses(many)) == steps and many.config["device"]["processes"] == processes
    assert np.abs(np.subtract(losses(many), losses(one))).max() < 1e-4
    assert many.summary["val/loss"] == pytest.approx(one.summary["val/loss"], abs=1e-4)
    assert many.summary["val/bpb"] == pytest.approx(one.summary["val/bpb"], abs=1e-4)
    # rank 0 holds its share of the optimizer state; the checkpoint holds all of it, as one process would have written it
    assert many.summary["mem/optimizer_bytes"] < one.summary["mem/optimizer_bytes"] * (1 / processes + 0.15)
    a, b = (load_checkpoint(metrics.runs_dir() / tag, steps)[0] for tag in ("many", "one"))
    shapes = [{name: {key: tuple(t.shape) for key, t in entries.items()} for name, entries in state["optimizer"].items()} for state in (a, b)]
    assert shapes[0] == shapes[1]
    for name, weight in b["model"].items():
        np.testing.assert_allclose(a["model"][name], weight, atol=0.02, err_msg=name)


def cut_off_after(step: int, folder):
    """As if the run had been killed before its next checkpoint."""
    for later in (s for s in saved_steps(folder) if s > step):
        subprocess.run(["rm", "-r", folder / f"checkpoints/step_{later:06d}"], check=True)
    (folder / "summary.json").write_text('{"status": "running"}')


def test_three_processes_stop_and_resume_to_the_bit(train, corpus_dir):
    flags = ["--num-iterations", "12", "--save-every", "4", "--keep", "-1", "--model-tag", "three"]
    assert torchrun(3, corpus_dir, *flags).returncode == 0
    straight = metrics.load_run(metrics.runs_dir() / "three")
    cut_off_after(4, metrics.runs_dir() / "three")
    assert torchrun(3, corpus_dir, *flags, "--resume", "auto").returncode == 0
    resumed = metrics.load_run(metrics.runs_dir() / "three")
    assert (metrics.runs_dir() / "three/metrics.jsonl").read_text().count("\n") == 12 + 8  # it did run steps 5 to 12 again
    assert losses(straight) == losses(resumed) and straight.summary["val/loss"] == resumed.summary["val/loss"]


def test_a_run_goes_on_with_another_number_of_processes_and_batch_size(train, corpus_dir):
    flags = ["--num-iterations", "30", "--save-every", "10", "--keep", "-1", "--mlp-rank", "8"]
    one = train(*FLAGS, *flags, tag="one")
    assert torchrun(2, corpus_dir, *flags, "--model-tag", "moved").returncode == 0
    cut_off_after(10, metrics.runs_dir() / "moved")
    moved = train(*FLAGS, *flags, "--device-batch-size", 4, "--resume", "auto", tag="moved")
    assert len(losses(moved)) == 30 and np.abs(np.subtract(losses(moved), losses(one))).max() < 1e-4
    cut_off_after(20, metrics.runs_dir() / "moved")
    assert torchrun(3, corpus_dir, *flags, "--device-batch-size", "1", "--model-tag", "moved", "--resume", "auto").returncode == 0
    moved = metrics.load_run(metrics.runs_dir() / "moved")
    assert np.abs(np.subtract(losses(moved), losses(one))).max() < 1e-4 and moved.config["device"]["processes"] == 3


def test_two_nodes_on_one_machine(train, corpus_dir):
    flags = training(corpus_dir, "--model-tag", "nodes")
    endpoint = f"127.0.0.1:{20000 + os.getpid() % 20000}"
    environment = {**ENVIRONMENT, "NANOCHAT_BASE_DIR": os.environ["NANOCHAT_BASE_DIR"]}
    nodes = [subprocess.Popen(command(1, *flags, launcher=("--nnodes=2", f"--node_rank={node}", "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}",
                                                           "--rdzv_id=test", "--local_addr=127.0.0.1")),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for node in (0, 1)]
    for node in nodes:
        _, stderr = node.communicate(timeout=120)
        assert node.returncode == 0, stderr[-2000:]
    run, one = metrics.load_run(metrics.runs_dir() / "nodes"), train(*FLAGS, tag="one")
    assert run.config["device"]["processes"] == 2 and np.abs(np.subtract(losses(run), losses(one))).max() < 1e-4


def test_a_signal_stops_all_processes_after_the_same_step_with_their_state_saved(train, corpus_dir):
    flags = ["--num-iterations", "150", "--eval-every", "-1", "--model-tag", "stopped"]
    folder = metrics.runs_dir() / "stopped"
    environment = {**ENVIRONMENT, "NANOCHAT_BASE_DIR": os.environ["NANOCHAT_BASE_DIR"]}
    launcher = subprocess.Popen(command(2, *training(corpus_dir, *flags)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_text().count("\n") < 5:
        time.sleep(0.1)
        assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)  # torchrun hands it on to its processes
    launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    stopped = metrics.load_run(folder)
    assert stopped.summary["status"] == "stopped" and 5 <= stopped.summary["step"] < 150
    assert saved_steps(folder) == [stopped.summary["step"]]
    resumed = torchrun(2, corpus_dir, *flags, "--resume", "auto")
    assert resumed.returncode == 0 and len(losses(metrics.load_run(folder))) == 150


def test_processes_that_hold_different_parameters_are_found(tmp_path):
    (tmp_path / "script.py").write_text("""
import torch, torch.distributed as dist
from nanochat.parallel import differing_parameters
dist.init_process_group("gloo")
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
torch.nn.init.ones_(model[0].weight), torch.nn.init.ones_(model[0].bias), torch.nn.init.ones_(model[1].weight), torch.nn.init.ones_(model[1].bias)
assert differing_parameters(model) == []
model[1].weight.data[1, 2] += 1.2e-7 * dist.get_rank()
assert differing_parameters(model) == ["1.weight"], differing_parameters(model)
dist.destroy_process_group()
""")
    done = subprocess.run(command(2, str(tmp_path / "script.py")), capture_output=True, text=True, timeout=120,
                          env={**ENVIRONMENT, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_bad_flag_is_said_once_under_torchrun(base_dir, corpus_dir):
    done = torchrun(2, corpus_dir, "--total-batch-size", "300")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "× 2 process(es) = 128; nearest: 256 or 384" in lines[0]
