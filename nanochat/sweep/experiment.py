"""An experiment file: a question with several axes, and the runs that answer it.

[flags]
    Flags of scripts.base_train, written as on the command line: vocabulary, text, steps, … They are the same
    in every run.
[points.NAME]
    What is compared: the flags of one point. Lists of values make a point for each combination.
    budget-params = "NAME": as many parameters as the point NAME of this file has.
    paired-with = "NAME": its full-rank partner is this point (see baseline).
    script = "adapter_train", base = "NAME": the point starts from the finished run of the point NAME, with
    the same seed, or else with the first seed of NAME. Its flags are those of adapter_train. It may have a
    text of its own, `data`.
[grid]
    Lists of values. Every point runs at every combination of them.
[evals.NAME]
    script = "layer_map_eval", base = "NAME", and flags: a measurement of the run of the point NAME. It is
    made after all runs and written beside the report.
seeds = [1, 2]
    Every point runs with each seed. A point may have seeds of its own.
baseline = true
    Every low-rank run gets a full-rank partner: the same flags without those of ranks, and the same seed.
processes = 1
    Processes of one run, on one machine.
question, cost
    A line each, for the reader.
[preset.NAME]
    Any of these again. It adds to the tables above and replaces other values.

dev/experiments/ has examples.
"""

import os
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from nanochat import metrics
from nanochat.common import get_base_dir
from nanochat.dataset import HUB_SETS
from nanochat.errors import InputError, printable
from nanochat.gpt import GPTConfig
from nanochat.naming import LONGEST_TAG, check_tag, option, part_of_tag
from nanochat.run_files import read_summary
from nanochat.sweep.expansion import find_trial, make_trials
from nanochat.sweep.schema import (
    check_eval,
    check_spec,
    choose_preset,
    load_toml,
    nearest,
    parse_script_flags,
    without_point_keys,
)
from nanochat.sweep.trial import Trial, flags_for_script, resolve_trial, to_argv

NAMED_TEXT = re.compile(r"([A-Za-z0-9._-]+)=(.+)", re.DOTALL)  # --data NAME=TEXT
SAVES = 10  # checkpoints of a run: a power cut costs at most a tenth of it


@dataclass(frozen=True)
class Point:
    """One run: a trial of the experiment under one seed."""

    tag: str  # name of the run folder: <sweep>_<label>_s<seed>
    label: str  # distinguishes it from the other points: "medium", "scan_lr0.02"
    seed: int
    argv: tuple[str, ...]  # for its script, all but --run
    processes: int
    varying: tuple[str, ...]  # the flags that not all points share: "attn-rank=64", …
    pair: str  # tag of its full-rank partner; "" without one
    args: Namespace  # argv, parsed by its script
    config: GPTConfig  # the model
    plan: dict  # see nanochat.plan.training_plan
    script: str = "base_train"
    base: str = ""  # tag of the run that it starts from; "" if it starts from scratch

    @property
    def folder(self) -> Path:
        return metrics.runs_dir() / self.tag

    def status(self) -> str:
        """'new', or the status in the run folder: see run_files.read_summary."""
        if not (self.folder / "config.json").exists():
            return "new"
        return read_summary(self.folder)["status"]


@dataclass(frozen=True)
class Eval:
    """A measurement of one finished run, made after all runs."""

    name: str  # its folder beside the report
    base: str  # tag of the run
    script: str
    argv: tuple[str, ...]  # all but --out


@dataclass(frozen=True)
class Sweep:
    """An experiment with all its points, in the order in which they run."""

    name: str  # of the file, and of the preset if one is chosen: "low_rank_substitution-small"
    file: Path
    preset: str  # "" if the file has none
    question: str
    cost: str
    data: str  # the text of all points without one of their own
    vocab_size: int
    processes: int  # of each run
    points: tuple[Point, ...]
    duplicates: tuple[tuple[str, str], ...] = ()  # (label, label of the point that is the same run)
    evals: tuple[Eval, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()  # (name in a point, where it is) of other texts than `data`

    @property
    def folder(self) -> Path:
        """Logs, scripts and the report of this sweep. The runs are in the folder of all runs."""
        return get_base_dir() / "sweeps" / self.name

    def data_flags(self) -> list[str]:
        """--data of scripts.sweep for these texts; not for those that the file names by a path."""
        words = [f"{name}={text}" for name, text in self.texts]
        named_texts = [word for word in words if NAMED_TEXT.fullmatch(word)]
        return [word for text in (self.data, *named_texts) for word in option("--data", text)]

    def point(self, tag: str) -> Point:
        for point in self.points:
            if point.tag == tag:
                return point
        hint = nearest(tag, [point.tag for point in self.points])
        raise InputError(f"--task {tag}: {self.file} has no such point{hint}; --plan lists them")


def read_experiment(
    path: Path,
    preset: str = "",
    data: str = "",
    texts: dict[str, str] | None = None,
    defaults: dict | None = None,
) -> Sweep:
    """An experiment file as a sweep. It depends on the file and these arguments alone.

    data: the text, in place of the file's; texts: {name of a text in the file: where it is};
    defaults: {flag: value} for flags that the file does not give.

    InputError, in one line: an unknown key, flag or preset, a value that a flag refuses, an impossible model
    or horizon, two points with one name.
    """
    path = Path(path)
    content = choose_preset(load_toml(path), preset, path)
    content["flags"] = {**(defaults or {}), **content.get("flags", {})}
    try:
        return make_sweep(check_spec(content), path, preset, data, texts or {})
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


def make_sweep(spec: dict, path: Path, preset: str, data: str, texts: dict[str, str]) -> Sweep:
    """See `read_experiment`. spec: the file's content, checked."""
    name = part_of_tag(path.stem)
    if preset:
        name = f"{name}-{preset}"
    check_tag("the sweep, named by its file and preset,", name)

    main = str(spec["flags"].get("data", "stdlib"))
    texts = locate_texts(spec, {main: data, **texts} if data else texts)
    data = texts.pop(main)
    spec = {**spec, "flags": {**spec["flags"], "data": data}}

    trials, duplicates = make_trials(spec, texts)
    check_names(name, trials)
    points = []
    for seed in dict.fromkeys(seed for trial in trials for seed in trial.seeds):
        # the runs of one seed, which are compared, follow one another in time
        points += [make_point(name, trial, seed) for trial in trials if seed in trial.seeds]
    return Sweep(
        name=name,
        file=path,
        preset=preset,
        question=printable(spec.get("question", "")),
        cost=printable(spec.get("cost", "")),
        data=data,
        vocab_size=points[0].args.vocab_size,
        processes=spec["processes"],
        points=tuple(points),
        duplicates=tuple(duplicates),
        evals=make_evals(name, trials, spec),
        texts=tuple(texts.items()),
    )


def locate_texts(spec: dict, places: dict[str, str]) -> dict[str, str]:
    """{text, as the file names it: where it is}, of [flags] and of the points that have their own.

    places: {name: where it is}; it replaces the file's.
    """
    main = str(spec["flags"].get("data", "stdlib"))
    names = [main, *(str(table["data"]) for table in spec["points"].values() if "data" in table)]
    unknown = sorted(places.keys() - set(names))
    if unknown:
        choices = ", ".join(dict.fromkeys(names))
        raise InputError(f"--data {unknown[0]}=…: the file has no text of this name; it names {choices}")
    return {name: absolute_folder(places.get(name, name)) for name in names}


def absolute_folder(text: str) -> str:
    """A folder's absolute path: the same command in another folder then means the same run. Else the text."""
    return text if text in ("stdlib", *HUB_SETS) else os.path.abspath(os.path.expanduser(text))


def check_names(sweep: str, trials: list[Trial]):
    """InputError if two trials would share a run folder, or a tag is too long for one."""
    trial_by_label = {}
    for trial in trials:
        # on some file systems a and A are the same name
        other = trial_by_label.setdefault(trial.label.lower(), trial)
        if other is not trial:
            names = {**trial.flags, **other.flags}
            differing = sorted(name for name in names if trial.flags.get(name) != other.flags.get(name))
            raise InputError(
                f"two points are named {trial.label or 'the same'}, "
                f"with other values of {', '.join(differing)}; rename one"
            )
        if len(tag_of_run(sweep, trial.label, max(trial.seeds)).encode()) > LONGEST_TAG:
            raise InputError(f"point {trial.label}: this name is too long for a folder; shorten it")


def tag_of_run(sweep: str, label: str, seed: int) -> str:
    return "_".join(filter(None, [sweep, label, f"s{seed}"]))


def make_point(sweep: str, trial: Trial, seed: int) -> Point:
    args, config, plan = resolve_trial(trial)
    tag = tag_of_run(sweep, trial.label, seed)
    tags = {"model-tag": tag}
    base = ""
    if trial.base:
        base = tag_of_run(sweep, trial.base.label, seed if seed in trial.base.seeds else trial.base.seeds[0])
        tags = {"model-tag": base, "run-tag": tag}
    saving = {"save-every": max(1, plan["num_iterations"] // SAVES), "keep": 1}
    flags = flags_for_script({**saving, **trial.flags, "resume": "auto"}, trial)
    argv = to_argv({**flags, "seed": seed, **tags})
    varying = []
    for flag, value in trial.flags.items():
        if flag in trial.own_flags and value is not False:
            varying.append(flag if value is True else f"{flag}={value}")
    return Point(
        tag=tag,
        label=trial.label,
        seed=seed,
        argv=argv,
        processes=trial.processes,
        varying=tuple(varying),
        pair=tag_of_run(sweep, trial.partner.label, seed) if trial.partner else "",
        args=parse_script_flags(trial.script, argv),
        config=config,
        plan=plan,
        script=trial.script,
        base=base,
    )


def make_evals(sweep: str, trials: list[Trial], spec: dict) -> tuple[Eval, ...]:
    """The evals of the file, each of its point's run under the first seed. InputError for wrong flags."""
    first_values = {flag: values[0] for flag, values in spec["grid"].items()}
    anywhere = Trial({}, "", {**spec["flags"], **first_values}, [], 1)
    evals = []
    for name, table in spec["evals"].items():
        check_eval(name, table)
        trial = find_trial(f"[evals.{name}]: base", table["base"], anywhere, trials, spec)
        tag = tag_of_run(sweep, trial.label, trial.seeds[0])
        argv = to_argv({"model-tag": tag, **without_point_keys(table)})
        try:
            parse_script_flags(table["script"], argv)
        except InputError as e:
            raise InputError(f"[evals.{name}]: {e}") from None
        evals.append(Eval(name, tag, table["script"], argv))
    return tuple(evals)
