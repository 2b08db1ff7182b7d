"""Real processes: torchrun on gloo gives the single-process run."""
import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import TINY, losses
from nanochat import metrics

FIFTY = ["--num-iterations", "50", "--eval-every", "25", "--device-batch-size", "2", "--total-batch-size", "384"]


def torchrun(processes: int, corpus_dir, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               "-m", "scripts.base_train", *TINY, "--data", str(corpus_dir), *flags]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240)


@pytest.mark.parametrize("flags", [[], ["--attn-rank", "8", "--mlp-rank", "8", "--grad-clip", "1.0"]])
def test_two_processes_give_the_losses_of_one(train, corpus_dir, flags):
    done = torchrun(2, corpus_dir, *FIFTY, *flags, "--model-tag", "two")
    assert done.returncode == 0, done.stderr[-2000:]
    two, one = metrics.load_run(metrics.runs_dir() / "two"), train(*FIFTY, *flags, tag="one")
    assert len(losses(two)) == 50 and two.config["device"]["processes"] == 2
    assert np.abs(np.subtract(losses(two), losses(one))).max() < 1e-4
    assert two.summary["val/loss"] == pytest.approx(one.summary["val/loss"], abs=1e-4)
    assert two.summary["val/bpb"] == pytest.approx(one.summary["val/bpb"], abs=1e-4)


def test_three_processes_stop_and_resume_to_the_bit(train, corpus_dir):
    flags = ["--num-iterations", "12", "--device-batch-size", "2", "--total-batch-size", "384", "--save-every", "4", "--keep", "-1"]
    assert torchrun(3, corpus_dir, *flags, "--model-tag", "straight").returncode == 0
    assert torchrun(3, corpus_dir, *flags, "--model-tag", "resumed").returncode == 0
    folder = metrics.runs_dir() / "resumed"  # as if killed before the end: only the checkpoint of step 4 is left
    for step in (8, 12):
        subprocess.run(["rm", "-r", folder / f"checkpoints/step_{step:06d}"], check=True)
    (folder / "summary.json").write_text('{"status": "running"}')
    assert torchrun(3, corpus_dir, *flags, "--model-tag", "resumed", "--resume", "auto").returncode == 0
    straight, resumed = (metrics.load_run(metrics.runs_dir() / tag) for tag in ("straight", "resumed"))
    assert losses(straight) == losses(resumed) and straight.summary["val/loss"] == resumed.summary["val/loss"]


def test_a_bad_flag_is_said_once_under_torchrun(base_dir, corpus_dir):
    done = torchrun(2, corpus_dir, "--total-batch-size", "300")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "× 2 process(es) = 256; nearest: 256 or 512" in lines[0]
