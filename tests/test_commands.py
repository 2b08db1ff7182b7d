"""Every command of the README and the guides is run as it stands there, in their order, on a tiny text.

Only what makes it big is replaced: DIR becomes a folder of tiny stories, and flags that make a model small
are added at the end.
"""

import os
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT, losses
from processes import free_port
from test_core_eval import write_bundle
from test_speedrun import SMALL

from nanochat import metrics

PAGES = ["README.md"] + [
    f"dev/{name}.md"
    for name in (
        "RANKS",
        "RUNS",
        "DATA",
        "EXPERIMENTS",
        "REPORT",
        "ADAPTERS",
        "SUBSPACES",
        "INFERENCE",
        "SCALE",
        "bench/README",
    )
]

STEPS = [
    "--max-seq-len",
    "32",
    "--device-batch-size",
    "4",
    "--total-batch-size",
    "256",
    "--num-iterations",
    "4",
    "--eval-tokens",
    "512",
    "--sample-every",
    "-1",
]
SMALLER = {
    "tok_train": ["--vocab-size", "300"],
    "base_train": ["--depth", "4", "--model-dim", "128", "--head-dim", "32", *STEPS],
    "base_train --init-from": [flag for flag in STEPS if flag not in ("--max-seq-len", "32")],
    "adapter_train": [
        "--num-iterations",
        "4",
        "--device-batch-size",
        "4",
        "--total-batch-size",
        "256",
        "--eval-tokens",
        "512",
        "--sample-every",
        "-1",
    ],
    "base_eval": ["--eval-tokens", "512"],
    "generate": ["--max-tokens", "8"],
    "infer_bench": ["--batch-sizes", "1", "--prompt-tokens", "8", "--repeats", "1"],
    "layer_bench": [
        "--model-dim",
        "64",
        "--vocab-size",
        "300",
        "--ranks",
        "0.25",
        "--tokens",
        "64",
        "--repeats",
        "1",
    ],
    "layer_map_eval": ["--eval-tokens", "64"],
}
ELSEWHERE = {  # commands that another test runs, or that no test can
    "bash speedrun.sh": "test_speedrun",
    "bash dev/test.sh": "this suite",
    "bash dev/bench/gpu.sh": "needs a GPU; test_bench runs its parts",
    "dev/bench/": "test_bench",
    "dev/experiments/low_rank_substitution.toml": "test_the_experiment_of_the_guide",
    "source .venv/bin/activate": "speedrun.sh does it too",
    "srun": "test_speedrun_with_variables_and_again_on_two_nodes_under_slurm",
    "DATA=": "the same",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


def commands() -> list[str]:
    """Each command once, where it stands first."""
    text = "\n".join("\n".join(blocks(page, "bash")) for page in PAGES)
    lines = {}
    for line in text.replace("\\\n", " ").splitlines():
        if words := " ".join(shlex.split(line, comments=True)):
            lines.setdefault(words, line)
    return list(lines.values())


def words_of(command: str, corpus: str) -> list[str]:
    return [corpus if word in ("DIR", "wiki/") else word for word in shlex.split(command, comments=True)]


def smaller(words: list[str]) -> list[str]:
    """The command with the flags that make it small."""
    script = words[2].removeprefix("scripts.")
    return SMALLER.get(f"{script} --init-from" if "--init-from" in words else script, [])


def test_every_command_runs_in_the_order_of_the_pages(base_dir, corpus_dir, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    bundle = tmp_path / "bundle"  # the command of the guide downloads it
    write_bundle(bundle)
    ran = []
    for text in commands():
        if any(part in text for part in ELSEWHERE):
            continue
        words = words_of(text, str(corpus_dir))
        assert words[0] == "python", text
        if words[1:3] == ["-m", "scripts.layer_map_eval"] and "tuned" in words:
            shutil.copytree(metrics.runs_dir() / "full", metrics.runs_dir() / "tuned")
        if words[1] == "-m":
            core = ["--core-dir", str(bundle)] if "core,bpb,sample" in words else []
            code, stdout, stderr = command(
                f"scripts/{words[2].removeprefix('scripts.')}.py", *words[3:], *smaller(words), *core
            )
        else:
            code, stdout, stderr = command(words[1], *words[2:])
        assert not code, f"{text}\n{stdout[-2000:]}\n{stderr[-2000:]}"
        ran.append(words[2])
    assert len(ran) >= 38 and {
        "scripts.base_train",
        "scripts.adapter_train",
        "scripts.materialize",
        "scripts.report",
    } <= set(ran)
    for picture in (
        "report/report.html",
        "infer/infer_bench.png",
        "maps/layer_maps.png",
        "both/layer_maps.png",
        "low.json",
    ):
        assert (tmp_path / picture).stat().st_size > 500, picture


def test_the_experiment_of_the_guide(tmp_path, corpus_dir, monkeypatch, command):
    """The file in the guide under the commands beside it; the model and the text are made small."""
    (text,) = blocks("dev/EXPERIMENTS.md", "toml")
    flags = dict(zip(STEPS[::2], STEPS[1::2]))
    small = "\n".join(f"{flag[2:]} = {value}" for flag, value in flags.items())
    for given, instead in (
        ('data = "tinystories"', f"data = '{corpus_dir}'\nhead-dim = 16\n{small}"),
        ("vocab-size = 4096", "vocab-size = 300"),
        ("depth = 4", "depth = 1"),
        ("depth = 8", "depth = 2"),
        ("model-dim = 384", "model-dim = 32"),
        ("[1, 2, 3]", "[1]"),
        ("[0.25, 0.333]", "[0.25]"),
    ):
        assert given in text
        text = text.replace(given, instead)
    (tmp_path / "experiment.toml").write_text(text)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    lines = [line for line in commands() if "low_rank_substitution.toml" in line]
    assert len(lines) == 2
    for line in lines:
        words = words_of(
            line.replace(
                "dev/experiments/low_rank_substitution.toml --preset small", str(tmp_path / "experiment.toml")
            ),
            "",
        )
        assert words[:3] == ["python", "-m", "scripts.sweep"], line
        code, stdout, stderr = command("scripts/sweep.py", *words[3:])
        assert code == 0, stdout[-2000:] + stderr[-2000:]
    assert (tmp_path / "base/sweeps/experiment/report/report.html").stat().st_size > 10_000


def test_the_experiment_of_the_readme_is_planned(tmp_path, corpus_dir, monkeypatch, command):
    (text,) = blocks("README.md", "toml")
    (tmp_path / "experiment.toml").write_text(text.replace("tinystories", str(corpus_dir)))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    code, stdout, stderr = command("scripts/sweep.py", tmp_path / "experiment.toml", "--plan")
    assert code == 0 and "9 runs" in stdout, stdout[-2000:] + stderr[-2000:]


def readme_speedrun(command: str, folder, corpus_dir, **variables):
    """The exit code and what is printed of a command of the README that calls speedrun.sh."""
    for name in re.findall(r"([A-Z_]+)=", command):
        variables.pop(name, None)
    home = folder / "home"
    shutil.copytree(corpus_dir, home / "my_texts", dirs_exist_ok=True)
    small = {name: value for name, value in SMALL.items() if f"{name}=" not in command}
    env = {
        **os.environ,
        **small,
        **variables,
        "HOME": str(home),
        "NANOCHAT_BASE_DIR": "~/../base",
        "WANDB_MODE": "offline",
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280
    )
    return done.returncode, done.stdout + done.stderr


needs_environment = pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="made by dev/test.sh")


SRUN = """#!/usr/bin/env bash
# the command on two "nodes" of this machine
while [[ "$1" == --* ]]; do shift; done
export SLURM_NNODES=2 SLURM_JOB_NODELIST=this
SLURM_NODEID=1 "$@" & second=$!
SLURM_NODEID=0 "$@"
code=$?
wait "$second" && exit "$code"
"""


@needs_environment
def test_speedrun_with_variables_and_again_on_two_nodes_under_slurm(tmp_path, corpus_dir):
    """The line that sets them, with its wandb name. Then, with an srun that starts two nodes on this machine,
    it does what is missing. (Two processes of one node: test_speedrun.py.)
    """
    command = next(line for line in commands() if line.startswith("DATA=")).replace(
        "NUM_ITERATIONS=500", "NUM_ITERATIONS=6"
    )
    code, output = readme_speedrun(command, tmp_path, corpus_dir, NPROC="1")
    assert code == 0, output[-3000:]
    assert "validation perplexity" in output
    full, low = sorted((tmp_path / "base/runs").iterdir(), key=lambda run: "full" not in run.name)
    assert full.name.startswith("my_texts_v300_d6") and low.name.endswith("_attn0.25_mlp0.25")
    for run in (full, low):
        assert list(run.glob("wandb/offline-run-*"))
        assert metrics.load_run(run).config["device"]["processes"] == 1
    check_report(tmp_path / "base/report")
    written = (full / "metrics.jsonl").stat().st_mtime_ns
    before = losses(metrics.load_run(low))
    shutil.rmtree(low)
    shutil.rmtree(tmp_path / "base/report")

    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    variables = dict(word.split("=", 1) for word in shlex.split(command) if "=" in word)
    command = next(line for line in commands() if line.startswith("srun"))
    code, output = readme_speedrun(
        command,
        tmp_path,
        corpus_dir,
        **variables,
        NPROC="1",
        MASTER_PORT=str(free_port()),
        PATH=f"{programs}:{os.environ['PATH']}",
    )
    assert code == 0 and output.count("already finished") == 1 and "already trained" in output, output[-3000:]
    assert (full / "metrics.jsonl").stat().st_mtime_ns == written
    assert sorted((tmp_path / "base/runs").iterdir()) == sorted((full, low))
    run = metrics.load_run(low)
    assert run.config["device"]["processes"] == 2
    assert len(before) == 6 and np.abs(np.subtract(losses(run), before)).max() < 1e-4
    check_report(tmp_path / "base/report")


def check_report(folder):
    for name in (
        "report.md",
        "report.html",
        "report.csv",
        "loss.png",
        "parameters.png",
        "memory.png",
        "perplexity.png",
    ):
        assert (folder / name).stat().st_size > 500, name
