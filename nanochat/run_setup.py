"""A run before its first step: what its flags decide, and what its processes agree on.

`start_run` makes a `TrainingRun` of a `RunSpec`: the processes meet, agree, and open the text.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from nanochat import agreement, arguments, attention, continuation, devices, metrics, processes
from nanochat.gpt import GPTConfig
from nanochat.locks import Lock
from nanochat.mlp_kernel import check_mlp_kernel
from nanochat.processes import World
from nanochat.shared_text import TrainingText, open_rows
from nanochat.tokenizer import Tokenizer


@dataclass
class RunSpec:
    """What a run is, as its flags decide it before anything is touched."""

    args: arguments.Flags
    tag: str  # the name of its folder
    config: GPTConfig
    plan: dict  # plan.training_plan
    accounting: dict  # params/…, flops/…, mem/… that are known before the first step
    tokenizer: Tokenizer
    open_text: Callable  # () -> the dataset.Corpus to train on
    tag_flag: str = "--model-tag"  # the flag that gave the tag
    weights: dict | None = None  # of a new run, as `Trainable.load` takes them; None: as the model was built
    evaluate_first: bool = False  # the model was trained before: it is evaluated before the first step too
    derived: dict = field(default_factory=dict)  # what config.json holds under "derived" beside the plan

    @property
    def flag(self) -> str:
        """The tag as the command line gives it, for messages."""
        return f"{self.tag_flag} {self.tag}"


@dataclass
class TrainingRun:
    """A run that its processes have agreed on."""

    spec: RunSpec
    world: World
    dtype: torch.dtype
    text: TrainingText
    config: dict  # of config.json
    folder: Path
    lock: Lock | None = None  # on process 0, by which it holds the folder

    @property
    def args(self) -> arguments.Flags:
        return self.spec.args

    @property
    def plan(self) -> dict:
        return self.spec.plan

    @property
    def steps(self) -> int:
        return self.spec.plan["num_iterations"]

    @property
    def rows_per_step(self) -> int:
        return self.plan["total_batch_size"] // self.args.max_seq_len

    @property
    def is_first_process(self) -> bool:
        return self.world.rank == 0


def start_run(spec: RunSpec) -> TrainingRun:
    """Join the processes, agree on what this run is, and open its text. InputError where they differ."""
    args = spec.args
    device_type = devices.pick_device_type(args.device_type)
    folder = metrics.runs_dir() / spec.tag
    world = processes.init_process(device_type)
    dtype = agreement.from_first(world, training_dtype, args, folder, device_type)
    check_mlp_kernel(args.mlp_kernel, device_type, dtype)
    attention.choose_kernels(world.device, args.attn_kernel, dtype)
    agreement.confirm(world, common_values(spec))
    text = open_rows(args, spec.open_text, spec.tokenizer, world)
    run = TrainingRun(spec, world, dtype, text, {}, folder)
    run.config = agreement.from_first(world, run_config, run)
    return run


def training_dtype(args, folder: Path, device_type: str) -> torch.dtype:
    """A resumed run keeps the dtype that it began with."""
    run_dtype = metrics.dtype_so_far(folder, device_type)
    return devices.compute_dtype(args.dtype, device_type, training=True, run_dtype=run_dtype)


def common_values(spec: RunSpec) -> dict:
    """The values that each process computes by itself, and that must be the same in all.

    Of files and folders that flags name, the content counts: `confirm` compares it elsewhere.
    """
    paths = {*continuation.PLACES, "core_dir"}
    flags = {
        f"--{name.replace('_', '-')}": value for name, value in vars(spec.args).items() if name not in paths
    }
    return {
        **flags,
        "tag": spec.tag,
        "tokenizer": spec.tokenizer.hash,
        "model": asdict(spec.config),
        "plan": spec.plan,
        **spec.derived,
    }


def run_config(run: TrainingRun) -> dict:
    """What config.json holds."""
    spec = run.spec
    args = spec.args
    corpus = run.text.corpus
    fingerprints = {f"{split}_fingerprint": corpus.fingerprint(split) for split in ("train", "val")}
    given_before = continuation.flags_given(continuation.read_record(run.folder))
    return {
        "flags": vars(args),
        "given": sorted(args.given | given_before),
        "derived": {
            "model": asdict(spec.config),
            **spec.plan,
            "tokenizer_hash": spec.tokenizer.hash,
            **spec.derived,
            "val_tokens": run.text.validation.count * args.max_seq_len,
            "corpus": {"name": corpus.name, "path": corpus.path, **fingerprints},
            "epoch_rows": run.text.train_rows.count,
            "dropped_fraction": run.text.train_rows.dropped,
        },
        "text": corpus.record(),  # names of files: a resumed run need not have them in common
        "tokenizer": {"hash": spec.tokenizer.hash, "trained_on": spec.tokenizer.trained_on},
        "git": metrics.git_state(),
        "versions": metrics.versions(),
        "seed": args.seed,
        "device": {
            "type": run.world.device.type,
            "name": devices.device_name(run.world.device),
            "processes": run.world.size,
            "threads": torch.get_num_threads(),
            "dtype": str(run.dtype).removeprefix("torch."),
        },
    }
