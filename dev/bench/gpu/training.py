"""Call 2: real training on real text. First losses beside a CPU's, runs that are killed, and three models."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

from gpu import text
from gpu.runner import Item, Setting
from gpu.text import Task
from nanochat import metrics, plan
from nanochat.accounting import account
from nanochat.benchmark import spread
from nanochat.budget import choose_model
from nanochat.dataset import open_corpus
from nanochat.gpt import GPTConfig
from nanochat.token_cache import cached_tokens
from nanochat.token_workers import build_caches
from nanochat.tokenizer import load_tokenizer

POLL = 0.03  # seconds between two looks at the runs
NOISE = 0.02  # nats: how far the losses of a resumed run may be from those of an uninterrupted one
FULL = "full rank"
RECIPE = "recipe"
NARROW = "full rank, narrower"
PACE_STEPS = 60
SEEDS = (1, 2, 3)
LEAST_SEEDS = 2
START_SECONDS = 20  # of a run, before its first step and at its evaluations


# ---- the runs ----------------------------------------------------------------------------------------------


def start(tag: str, flags: list, setting: Setting) -> subprocess.Popen:
    """A run of scripts.base_train, as a user would start it."""
    common = ["--data", setting.data / "text", "--model-tag", tag, "--device-type", setting.device_type]
    common += ["--dtype", str(setting.dtype).removeprefix("torch.")]
    common += ["--sample-every", -1, "--core-metric-every", -1, "--run", "dummy"]
    command = [sys.executable, "-m", "scripts.base_train", *common, *flags]
    return subprocess.Popen(list(map(str, command)))  # its lines go to the log of the call


def history(tag: str) -> list[dict]:
    folder = metrics.runs_dir() / tag
    return metrics.load_run(folder).history if (folder / "config.json").is_file() else []


def lines_written(tag: str) -> int:
    path = metrics.runs_dir() / tag / "metrics.jsonl"
    return path.read_text("utf-8").count("\n") if path.exists() else 0


def shape_flags(task: Task) -> list:
    flags = ["--depth", task.depth, "--model-dim", task.width, "--head-dim", task.head_dim]
    return [*flags, "--max-seq-len", task.T, "--eval-tokens", task.eval_tokens]


def arms(task: Task) -> dict[str, list]:
    """{model: flags}. The narrower model has fewer heads, and as many parameters as the recipe."""
    recipe = ["--attn-rank", 0.25, "--mlp-rank", 0.297, "--matrix-ranks", "v=0,o=0"]
    goal = parameters(task, recipe)
    narrow = []
    for width in range(task.head_dim, task.width, task.head_dim):
        for hidden in range(2 * width, 6 * width, 8):
            narrow.append(["--model-dim", width, "--mlp-ratio", hidden / width])

    def distance(flags: list) -> float:  # in parameters first, then in the shape of the MLP
        return abs(parameters(task, flags) / goal - 1) + 0.002 * abs(flags[3] - 4)

    return {FULL: [], RECIPE: recipe, NARROW: min(narrow, key=distance)}


def parameters(task: Task, flags: list) -> int:
    args = plan.parse_flags(list(map(str, [*shape_flags(task), *flags])))
    return account(choose_model(args, task.vocab_size))["params/total"]


def long_flags(task: Task, steps: int, setting: Setting) -> list:
    flags = [*shape_flags(task), "--device-batch-size", task.rows, "--total-batch-size", task.batch]
    flags += ["--num-iterations", steps, "--compile", "off" if setting.tiny else "on"]
    return [*flags, "--eval-every", max(1, steps // 8)]


# ---- items -------------------------------------------------------------------------------------------------


def tokenise(setting: Setting):
    text.open_working_folder(setting)
    corpus = open_corpus(str(setting.data / "text"))
    tokenizer = load_tokenizer()
    started = time.monotonic()
    shards = corpus.train + corpus.val
    build_caches(shards, tokenizer)
    seconds = time.monotonic() - started
    tokens = sum(len(cached_tokens(shard, tokenizer)) for shard in shards)
    yield {"tokens": tokens, "seconds": seconds, "cores": os.cpu_count(), "files": len(shards)}


def first_losses(setting: Setting):
    """The first losses on the device, in float32 and in bfloat16, beside those that prepare.py found."""
    text.open_working_folder(setting)
    task = text.task_of(setting.tiny)
    reference = json.loads((setting.data / "reference.json").read_text("utf-8"))
    rows = text.training_rows(setting, task)
    result = {"cpu": reference["losses"]}
    for dtype in (torch.float32, torch.bfloat16):
        found = text.first_losses(rows, task, setting.device, dtype)
        result[str(dtype).removeprefix("torch.")] = found["losses"]
        # both machines draw the same model, or their losses cannot be compared
        result["same start"] = abs(found["weights"] / reference["weights"] - 1) < 1e-6
        yield result


def killed_and_resumed(setting: Setting):
    """Three runs of one command: one to its end, one killed and one told to stop, which are then resumed."""
    text.open_working_folder(setting)
    task = text.task_of(setting.tiny)
    steps = task.short_steps
    flags = [*shape_flags(task), "--device-batch-size", task.short_rows]
    flags += ["--total-batch-size", task.short_batch, "--num-iterations", steps, "--compile", "off"]
    flags += ["--save-every", steps // 4, "--eval-every", steps]
    signals = {"uninterrupted": None, "kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM}
    tags = {name: name.replace(" ", "") for name in signals}
    runs = {name: start(tag, flags, setting) for name, tag in tags.items()}
    waiting = {name for name, number in signals.items() if number}
    while waiting:
        for name in sorted(waiting):
            if runs[name].poll() is not None or lines_written(tags[name]) >= steps // 2:
                runs[name].send_signal(signals[name])
                waiting.remove(name)
        time.sleep(POLL)
    result = {name: {"ended by": run.wait()} for name, run in runs.items()}
    resumed = [start(tag, [*flags, "--resume", "auto"], setting) for tag in tags.values()]
    for run in resumed:  # the uninterrupted one says that it is finished
        run.wait()
    for name, tag in tags.items():
        result[name]["losses"] = [entry["train/loss"] for entry in history(tag)]
    reference = result["uninterrupted"]["losses"]
    for name, entry in result.items():
        pairs = list(zip(entry["losses"], reference))
        entry["largest difference"] = max((abs(a - b) for a, b in pairs), default=None)
        interrupted = (entry["ended by"] != 0) == bool(signals[name])
        entry["ok"] = interrupted and len(pairs) == steps and entry["largest difference"] <= NOISE
    yield result


def side_by_side(prefix: str, steps: int, seed: int, setting: Setting):
    """All three models at once on the one card. Yields {model: what its record holds so far}."""
    text.open_working_folder(setting)
    task = text.task_of(setting.tiny)
    tags = {}
    runs = {}
    for name, flags in arms(task).items():
        tags[name] = f"{prefix}_{name}".replace(" ", "").replace(",", "-")
        runs[name] = start(tags[name], [*long_flags(task, steps, setting), "--seed", seed, *flags], setting)
    while True:
        over = all(run.poll() is not None for run in runs.values())
        yield {name: record(tag, runs[name].poll()) for name, tag in tags.items()}
        if over:
            return
        time.sleep(1)


def record(tag: str, code: int | None) -> dict:
    """What a run's folder says of it now. code: its exit code, None while it runs."""
    entries = history(tag)
    if not entries:
        return {"exit code": code, "steps": 0}
    model = metrics.load_run(metrics.runs_dir() / tag).config["derived"]["model"]
    costs = account(GPTConfig(**model))
    evaluations = [entry for entry in entries if "val/loss" in entry]
    rates = [entry["train/tok_per_sec"] for entry in entries[len(entries) // 2 :]]
    return {
        "exit code": code,
        "steps": entries[-1]["step"],
        "parameters": costs["params/total"],
        "flops per token": costs["flops/per_token"],
        "tokens": entries[-1]["total_tokens"],
        "tokens per second": spread(rates),
        "training seconds": entries[-1]["total_training_time"],
        "validation": [[entry["step"], entry["val/loss"], entry["val/bpb"]] for entry in evaluations],
    }


# ---- the call ----------------------------------------------------------------------------------------------


def steps_that_fit(task: Task, pace: dict, seconds: float) -> int:
    """Steps of a run, for 20 tokens a parameter of the full-rank model, or as many as the time allows.

    pace: of `side_by_side`. seconds: for one seed. Every run takes the same steps, so the slowest decides.
    """
    wanted = round(task.tokens_per_parameter * parameters(task, []) / task.batch)
    rates = [entry["tokens per second"]["median"] for entry in pace.values() if entry["steps"]]
    if len(rates) < len(pace):
        return 0
    return min(wanted, int(seconds * min(rates) / task.batch))


def second_call(setting: Setting, report, deadline: float, run: Callable):
    """run: (items, how many together) -> None. Each part leaves what it found in the report."""
    task = text.task_of(setting.tiny)
    run([Item("tokenise", tokenise, 60)], 1)
    pace = partial(side_by_side, "pace", PACE_STEPS // (10 if setting.tiny else 1), 0)
    checks = [Item("first losses", first_losses, 60), Item("kill and resume", killed_and_resumed, 100)]
    run([Item("pace", pace, 100), *checks], 3)
    entries = report.entries["items"]
    pace = (entries["pace"].get("result") or {}) if "pace" in entries else {}
    available = deadline - time.monotonic()
    seconds = 0.95 * available / LEAST_SEEDS - START_SECONDS
    steps = steps_that_fit(task, pace, seconds) if pace else 0
    previous = 0.0
    report.entries |= {"steps": steps, "batch": task.batch, "full rank parameters": parameters(task, [])}
    if steps < 1:
        entries["training"] = {"status": "not begun: the pace is unknown, or no time is left"}
        report.save()
        return
    for number, seed in enumerate(SEEDS[:LEAST_SEEDS] if setting.tiny else SEEDS):
        started = time.monotonic()
        name = f"training, seed {seed}"
        if number >= LEAST_SEEDS and deadline - started < 1.05 * previous:
            entries[name] = {"status": "not begun: no time left"}
            report.save()
            continue
        run([Item(name, partial(side_by_side, f"seed{seed}", steps, seed), 600)], 1)
        previous = time.monotonic() - started
