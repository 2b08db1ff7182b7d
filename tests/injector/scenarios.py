"""The commands that faults strike."""

import errno
import json
import random
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from .library import HERE

CHANGES = "open_write,write,fsync,rename,link,unlink,rmdir,mkdir,truncate"
READS = "open_read,read,map,opendir,readdir"
# what --kinds may name: the kinds of calls that count, as faulty_files.c calls them
KINDS = {
    "changes": CHANGES,
    "reads": READS,
    "files": f"{CHANGES},{READS}",
    "all": f"{CHANGES},{READS},chmod,close_write,stat",
}
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
    "home",
    "again",
]


@dataclass(frozen=True)
class Scenario:
    """A command. {base}, {corpus} and {hub} in it stand for folders and an address."""

    module: str
    flags: tuple
    again: tuple = ()  # flags of the command that comes after the fault; (): the same
    before: str = ""  # the scenario whose end it begins with
    launched: bool = True  # whether torchrun may start it
    environment: tuple = ()  # (name, value) pairs


HORIZON = (
    "--device-batch-size",
    "4",
    "--total-batch-size",
    "256",
    "--num-iterations",
    "3",
    "--eval-every",
    "1",
    "--eval-tokens",
    "512",
    "--sample-every",
    "-1",
    "--save-every",
    "1",
    "--run",
    "dummy",
)
SHAPE = ("--depth", "2", "--model-dim", "32", "--head-dim", "16", "--max-seq-len", "32")
# the thresholds are crossed at steps 1, 2 and 3
TRAIN = (*SHAPE, *HORIZON, "--ppl-thresholds", "100,20,12", "--data", "{corpus}", "--model-tag", "tiny")
LOW = (*TRAIN, "--attn-rank", "4", "--mlp-rank", "8")
EARLY = (*TRAIN, "--num-iterations", "6", "--stop-at-ppl", "12")  # ends with step 3
ADAPT = ("--model-tag", "tiny", "--run-tag", "adapted", "--rank", "4", *HORIZON)
EVALUATE = ("--model-tag", "tiny", "--eval-tokens", "512")
SMALLER = ("--model-tag", "tiny", "--out-tag", "smaller", "--attn-rank", "8")
AUTO = ("--resume", "auto")
OFFLINE_HUB = (("HF_ENDPOINT", "{hub}"), ("HF_HUB_DISABLE_XET", "1"), ("HF_HOME", "{base}/../hf"))

SCENARIOS = {
    "tok_train": Scenario("scripts.tok_train", ("--data", "{corpus}", "--vocab-size", "300"), launched=False),
    # the first start, without a token cache
    "train": Scenario("scripts.base_train", TRAIN, (*TRAIN, *AUTO), before="tok_train"),
    "lowrank": Scenario("scripts.base_train", LOW, (*LOW, *AUTO), before="tok_train"),
    "early": Scenario("scripts.base_train", EARLY, (*EARLY, *AUTO), before="tok_train"),
    # all processes die when the checkpoint of step 3 is to have its name: see world.STOP
    "stopped": Scenario("scripts.base_train", TRAIN, before="tok_train"),
    "resume": Scenario("scripts.base_train", (*TRAIN, *AUTO), before="stopped"),
    "finished": Scenario("scripts.base_train", (*TRAIN, *AUTO), before="train"),
    "adapter": Scenario("scripts.adapter_train", ADAPT, (*ADAPT, *AUTO), before="train"),
    "base_eval": Scenario("scripts.base_eval", EVALUATE, before="train"),
    "materialize": Scenario("scripts.materialize", SMALLER, before="train", launched=False),
    "report": Scenario(
        "scripts.report", ("{base}/runs/tiny", "--out", "{base}/report"), before="train", launched=False
    ),
    "download": Scenario(
        "nanochat.dataset",
        ("--data", "climbmix", "-n", "2", "-w", "1"),
        launched=False,
        environment=OFFLINE_HUB,
    ),
}


@dataclass(frozen=True)
class Command:
    """The command of a scenario, in this many processes. again: the one that comes after the fault."""

    name: str
    processes: int = 1
    again: bool = False

    @property
    def scenario(self) -> Scenario:
        return SCENARIOS[self.name]

    @property
    def flags(self) -> tuple:
        return self.again and self.scenario.again or self.scenario.flags


def errno_number(fault: str) -> str:
    """A fault as faulty_files.c has it."""
    return str(getattr(errno, fault)) if hasattr(errno, fault) else fault


def write_corpus(folder: Path):
    folder.mkdir()
    for name, seeds in (("part0", range(150)), ("part1", range(150, 250)), ("val", range(1000, 1030))):
        lines = []
        for seed in seeds:
            rng = random.Random(seed)
            text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60))) + "."
            lines.append(json.dumps({"text": text}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))


def local_hub():
    """The hub of test_download.py, in a thread."""
    sys.path.insert(0, str(HERE.parent))
    import test_download

    names = ("shard_00000.parquet", "shard_00001.parquet", test_download.VAL)
    files = {name: test_download.parquet_bytes(f"text of {name}") for name in names}
    hub = test_download.Hub(test_download.CLIMBMIX, files)
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return hub
