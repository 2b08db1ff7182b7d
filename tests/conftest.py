"""What tests share: a corpus of simple sentences, its tokenizer, a function that trains a tiny model."""

import json
import random
import runpy
import signal
import sys
from pathlib import Path

import pytest

from nanochat import metrics, signals

ROOT = Path(__file__).parents[1]
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "finds",
    "likes",
    "red",
    "blue",
    "small",
    "big",
    "tree",
    "house",
    "and",
    "then",
    "it",
    "ran",
    "away",
    "home",
    "again",
]


# values of every kind that JSON and YAML have, for places where they do not belong
ODD = [None, True, -1, 1.5, float("nan"), "", [], [[]], {}]


def story(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60))) + "."


@pytest.fixture(scope="session", autouse=True)
def float32():
    """On every processor: what the tests compare is to be compared to many digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_DTYPE", "float32")
        yield


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """A folder with training and validation stories as jsonl."""
    folder = tmp_path_factory.mktemp("stories")
    for name, seeds in (("part0", range(300)), ("part1", range(300, 500)), ("val", range(1000, 1060))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": story(s)}) + "\n" for s in seeds))
    return folder


@pytest.fixture
def base_dir(tmp_path, monkeypatch, corpus_dir):
    """A fresh NANOCHAT_BASE_DIR with a tokenizer of 300 tokens."""
    from scripts import tok_train

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "300"])
    return tmp_path / "base"


TINY = [
    "--depth",
    "2",
    "--model-dim",
    "32",
    "--head-dim",
    "16",
    "--max-seq-len",
    "32",
    "--device-batch-size",
    "4",
    "--total-batch-size",
    "256",
    "--num-iterations",
    "6",
    "--eval-every",
    "3",
    "--eval-tokens",
    "1024",
    "--sample-every",
    "-1",
]


@pytest.fixture
def train(base_dir, corpus_dir):
    """train('--flag', value, …, tag='name') -> the finished Run of a tiny model; flags win over TINY."""
    from scripts import base_train

    def run(*flags, tag="tiny"):
        base_train.main([*TINY, "--data", str(corpus_dir), "--model-tag", tag, *map(str, flags)])
        return metrics.load_run(metrics.runs_dir() / tag)

    return run


@pytest.fixture
def command(monkeypatch, capfd):
    """command('scripts/x.py', '--flag', value, …) -> (exit code, stdout, stderr) of that script.

    It runs in this process, as `python scripts/x.py --flag value …` would in one of its own.
    """

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, getattr(sys, stream))  # a script replaces it
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            return end.code, *capfd.readouterr()
        return 0, *capfd.readouterr()

    handlers = {number: signal.getsignal(number) for number in signals.ENDING}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Killed(Exception):
    pass


@pytest.fixture
def kill_after(monkeypatch):
    """kill_after(n): the process dies when it starts update n + 1; kill_after(None): it lives again."""
    from scripts import base_train

    original = base_train.forward_backward

    def arm(n):
        left = [n]

        def step(*args):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return original(*args)

        monkeypatch.setattr(base_train, "forward_backward", original if n is None else step)

    return arm


def losses(run) -> list[float]:
    return [entry["train/loss"] for entry in run.history]


def tiny_experiment(path, text: str, seeds, data: str = ""):
    """Write an experiment file of runs with TINY's flags and these points; returns its path."""
    flags = {
        "vocab-size": 300,
        **({"data": f"'{data}'"} if data else {}),
        **{name[2:]: value for name, value in zip(TINY[::2], TINY[1::2])},
    }
    path.write_text(
        f"seeds = {list(seeds)}\n[flags]\n"
        + "".join(f"{name} = {value}\n" for name, value in flags.items())
        + text
    )
    return path
