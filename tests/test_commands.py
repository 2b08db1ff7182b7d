"""Every command of the README and the guides is run as it stands there, in their order, on a tiny text.

Only what makes it big is replaced: DIR becomes a folder of tiny stories, and flags that make a model small
are added at the end.
"""

import os
import re
import shlex
import shutil
import subprocess

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
    "srun": "test_speedrun_with_variables_on_two_nodes_under_slurm",
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


@pytest.mark.long
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


@pytest.mark.long
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


SRUN = """#!/usr/bin/env bash
# the command on two "nodes" of this machine
while [[ "$1" == --* ]]; do shift; done
export SLURM_NNODES=2 SLURM_JOB_NODELIST=this
SLURM_NODEID=1 "$@" & second=$!
SLURM_NODEID=0 "$@"
code=$?
wait "$second" && exit "$code"
"""


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="made by dev/test.sh")
def test_speedrun_with_variables_on_two_nodes_under_slurm(tmp_path, corpus_dir):
    """The line that sets variables, with its wandb name, by an srun that starts two nodes on this machine.
    (A second call and two processes of one node: test_speedrun.py.)
    """
    settings = next(line for line in commands() if line.startswith("DATA=")).removesuffix("bash speedrun.sh")
    srun = next(line for line in commands() if line.startswith("srun"))
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    command = f"export {settings.replace('NUM_ITERATIONS=500', 'NUM_ITERATIONS=6')}\n{srun}"
    shutil.copytree(corpus_dir, tmp_path / "home/my_texts")
    small = {name: value for name, value in SMALL.items() if f"{name}=" not in command}
    environment = {
        **os.environ,
        **small,
        "MASTER_PORT": str(free_port()),
        "HOME": str(tmp_path / "home"),
        "NANOCHAT_BASE_DIR": "~/../base",
        "WANDB_MODE": "offline",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    assert "already trained" in output and "validation perplexity" in output
    full, low = sorted((tmp_path / "base/runs").iterdir(), key=lambda run: "full" not in run.name)
    assert full.name.startswith("my_texts_v300_d6") and low.name.endswith("_attn0.25_mlp0.25")
    for folder in (full, low):
        run = metrics.load_run(folder)
        assert run.config["device"]["processes"] == 2 and len(losses(run)) == 6
        assert list(folder.glob("wandb/offline-run-*"))
    for name in (
        "report.md",
        "report.html",
        "report.csv",
        "loss.png",
        "parameters.png",
        "memory.png",
        "perplexity.png",
    ):
        assert (tmp_path / "base/report" / name).stat().st_size > 500, name
