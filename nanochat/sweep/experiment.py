"""An experiment file: a question with several axes, read into the runs that answer it.

    vocabulary, text, steps, …   [flags]         flags of scripts.base_train, written as on the command line, the same in every run
    what is compared             [points.NAME]   flags of one point; a list of values makes one point of each (all combinations)
    what all points vary in      [grid]          lists of values: every point at every combination of them
    seeds = [1, 2]                               every point under each seed; a point may have seeds of its own
    baseline = true                              every low-rank run has its full-rank partner: the same flags without those of the
                                                 ranks, under the same seed; `paired-with = "NAME"` in a point names another partner
    processes = 1                                of one run, on one machine
    budget-params = "NAME"                       in a point: as many parameters as the point NAME of this file has
    script = "adapter_train"                     a point that starts from the finished run of base = "NAME", under the same seed (or the first
                                                 that NAME has); its flags are adapter_train's, and it may name a text of its own in `data`
    [evals.NAME]                                 script = "layer_map_eval", base = "NAME" of a point, flags: made after the runs, beside the report
    question, cost                               a line each, for the reader
    [preset.NAME]                                any of these again; what it says replaces or adds to what stands above

dev/experiments/ has examples.
"""

import itertools
import os
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from nanochat import metrics
from nanochat.common import InputError, get_base_dir, printable
from nanochat.dataset import HUB_SETS
from nanochat.flags import FLAGS
from nanochat.gpt import GPTConfig
from nanochat.model_flags import RANK_GROUP
from nanochat.naming import LONGEST_TAG, check_tag, option, part_of_tag
from nanochat.rank import count_parameters
from nanochat.run_files import read_summary
from nanochat.sweep.schema import (
    POINTS_OWN,
    check_eval,
    check_flags,
    check_point,
    choose_preset,
    flags_of,
    load_toml,
    nearest,
    whole_numbers,
)
from nanochat.sweep.trial import Variant, identity, known, low_rank, resolved, to_argv

NAMED_TEXT = re.compile(r"([A-Za-z0-9._-]+)=(.+)", re.DOTALL)  # of --data NAME=TEXT
RANK_FLAGS = (*(flag.option[2:] for flag in RANK_GROUP.flags), "recompute")
SHORT = {flag.option[2:]: flag.short for flag in FLAGS if flag.short is not None}


@dataclass(frozen=True)
class Point:
    """One run: a point of the experiment under one seed."""

    tag: str  # of the run folder: <sweep>_<label>_s<seed>
    label: str  # what tells it from the other points: "medium", "scan_lr0.02"
    seed: int
    argv: tuple[str, ...]  # for its script, complete but for --run
    processes: int
    varying: tuple[str, ...]  # "attn-rank=64", …: the flags that not all points share
    pair: str  # tag of its full-rank partner; "" where it has none
    args: Namespace  # argv as its script reads it
    config: GPTConfig  # the model
    plan: dict  # see nanochat.plan.training_plan
    script: str = "base_train"
    base: str = ""  # tag of the run that it starts from; "" where it starts from scratch

    @property
    def folder(self) -> Path:
        return metrics.runs_dir() / self.tag

    def status(self) -> str:
        """'new', or what the run folder says: see run_files.read_summary."""
        if not (self.folder / "config.json").exists():
            return "new"
        return read_summary(self.folder)["status"]


@dataclass(frozen=True)
class Eval:
    """A measurement of one finished run, made after all of them."""

    name: str  # of its folder beside the report
    base: str  # tag of the run
    script: str
    argv: tuple[str, ...]  # complete but for --out


@dataclass(frozen=True)
class Sweep:
    """An experiment as it is to be run: all points, in the order in which they should be."""

    name: str  # of the file, and of the preset if one is chosen: "low_rank_substitution-small"
    file: Path
    preset: str  # "" if the file has none
    question: str
    cost: str
    data: str
    vocab_size: int
    processes: int  # of each run
    points: tuple[Point, ...]
    same: tuple[tuple[str, str], ...] = ()  # (label, label of the point that is the same run)
    evals: tuple[Eval, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()  # (name in a point, what it stands for) of texts beside `data`

    @property
    def folder(self) -> Path:
        """Logs, scripts and the report of this sweep. The runs themselves are where all runs are."""
        return get_base_dir() / "sweeps" / self.name

    def data_flags(self) -> list[str]:
        """--data as scripts.sweep takes it, for these texts; without those that the file names by paths."""
        named = [f"{name}={text}" for name, text in self.texts if NAMED_TEXT.fullmatch(f"{name}={text}")]
        return [word for text in (self.data, *named) for word in option("--data", text)]

    def point(self, tag: str) -> Point:
        for point in self.points:
            if point.tag == tag:
                return point
        raise InputError(
            f"--task {tag}: {self.file} has no such point{nearest(tag, [p.tag for p in self.points])}; --plan lists them"
        )


# ---- from a file to points ------------------------------------------------------------------------------------------


def read_experiment(
    path: Path,
    preset: str = "",
    data: str = "",
    texts: dict[str, str] | None = None,
    defaults: dict | None = None,
) -> Sweep:
    """All points of an experiment file. data: the text, in place of the file's; texts: {name of a text in the
    file: where it is}; defaults: {flag: value} for the flags that the file does not give.

    InputError, one line: an unknown key, flag or preset, a value that a flag refuses, an impossible model or horizon, two
    points of one name. Depends on the file and the arguments alone.
    """
    path = Path(path)
    spec = choose_preset(load_toml(path), preset, path)
    spec["flags"] = {**(defaults or {}), **spec.get("flags", {})}
    try:
        return plan_sweep(spec, path, preset, data, texts or {})
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


def plan_sweep(spec: dict, path: Path, preset: str, data: str, texts: dict[str, str]) -> Sweep:
    spec = {
        "flags": {},
        "grid": {},
        "evals": {},
        "seeds": [],
        "processes": 1,
        **spec,
        "points": spec.get("points") or {"": {}},
    }
    base = spec["flags"]
    check_flags("[flags]", base, lists=False)
    check_flags("[grid]", spec["grid"], shared=False, scalars=False)
    for name, table in spec["points"].items():
        check_point(name, table)
    whole_numbers("seeds", spec["seeds"], 0)
    whole_numbers("processes", [spec["processes"]], 1, 1024)  # of one machine
    if "vocab-size" not in base:
        raise InputError(
            "[flags]: vocab-size is missing; the tokenizer of the sweep is trained with it, for example vocab-size = 4096"
        )
    main = str(base.get("data", "stdlib"))
    texts = name_texts(spec, {**({main: data} if data else {}), **texts})
    base = {**base, "data": texts.pop(main)}

    variants = [v for name, table in spec["points"].items() for v in expand(name, table, base, spec)]
    for v in variants:
        resolve_budget(v, base, spec)
        if v.script != "base_train":
            v.base = point_called(f"point {v.label}: base", v.table["base"], v, variants, base, spec)
            v.flags["data"] = texts.get(v.flags["data"], base["data"]) if "data" in v.table else base["data"]
    pair_up(variants, base, spec)
    variants, same = merge_equal(variants)
    name = f"{part_of_tag(path.stem)}-{preset}" if preset else part_of_tag(path.stem)
    check_tag("the sweep, named by its file and preset,", name)
    check_names(name, variants)
    variants.sort(key=lambda v: v.base is not None)  # what others start from comes first
    points = [
        make_point(name, v, seed)
        for seed in dict.fromkeys(s for v in variants for s in v.seeds)
        for v in variants
        if seed in v.seeds
    ]  # all of one seed near one another in time
    question = printable(spec.get("question", ""))
    cost = printable(spec.get("cost", ""))
    return Sweep(
        name,
        path,
        preset,
        question,
        cost,
        base["data"],
        points[0].args.vocab_size,
        spec["processes"],
        tuple(points),
        tuple(same),
        make_evals(name, variants, base, spec),
        tuple(texts.items()),
    )


# ---- points ---------------------------------------------------------------------------------------------------------


def where_text_is(data: str) -> str:
    """A folder by its absolute path, so that the same command from elsewhere means the same run; names as they are."""
    return data if data in ("stdlib", *HUB_SETS) else os.path.abspath(os.path.expanduser(data))


def name_texts(spec: dict, given: dict[str, str]) -> dict[str, str]:
    """{text, as the file names it: where it is}, of [flags] and of the points that have their own. given: {name: where} in their place."""
    named = [
        str(spec["flags"].get("data", "stdlib")),
        *(str(table["data"]) for table in spec["points"].values() if "data" in table),
    ]
    if unknown := sorted(given.keys() - set(named)):
        raise InputError(
            f"--data {unknown[0]}=…: no text of this file is called so; it names {', '.join(dict.fromkeys(named))}"
        )
    return {name: where_text_is(given.get(name, name)) for name in named}


def check_names(sweep: str, variants: list[Variant]):
    by_label = {}
    for v in variants:
        other = by_label.setdefault(v.label.lower(), v)  # some file systems do not tell a from A
        if other is not v:
            differing = sorted(f for f in {**v.flags, **other.flags} if v.flags.get(f) != other.flags.get(f))
            raise InputError(
                f"two points are named {v.label or 'the same'}, with other values of {', '.join(differing)}; rename one"
            )
        if len(tag_of(sweep, v.label, max(v.seeds)).encode()) > LONGEST_TAG:
            raise InputError(f"point {v.label}: this name is too long for a folder")


def expand(name: str, table: dict, base: dict, spec: dict) -> list[Variant]:
    """A point at every combination of its lists and of the grid; a flag of its own is not taken from the grid."""
    own = {k: v for k, v in table.items() if k not in POINTS_OWN}
    axes = {
        **{k: v for k, v in own.items() if isinstance(v, list)},
        **{k: v for k, v in spec["grid"].items() if k not in own},
    }
    seeds = whole_numbers(f"[points.{name}]: seeds", table.get("seeds", spec["seeds"]), 0)
    if not seeds:
        raise InputError(f"{f'[points.{name}]: ' if name else ''}no seeds: write for example seeds = [1, 2]")
    variants = []
    for values in itertools.product(*axes.values()):
        varied = dict(zip(axes, values))
        label = "_".join(filter(None, [name, *(short(flag, value) for flag, value in varied.items())]))
        variants.append(
            Variant(
                table,
                label,
                {**base, **own, **varied},
                list(seeds),
                spec["processes"],
                {*own, *axes},
                table.get("paired-with", ""),
                script=table.get("script", "base_train"),
            )
        )
    return variants


def short(flag: str, value) -> str:
    """An axis in a name: lr0.02, attn64, d8."""
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    return f"{SHORT.get(flag, flag)}{part_of_tag(str(value))}"


def tag_of(sweep: str, label: str, seed: int) -> str:
    return "_".join(filter(None, [sweep, label, f"s{seed}"]))


def combination(v: Variant, spec: dict) -> dict:
    """The part of the grid that it stands at."""
    return {flag: v.flags[flag] for flag in spec["grid"]}


def at_same_place(where: str, name: str, grid: dict, base: dict, spec: dict) -> Variant:
    """The point `name` at a place of the grid. InputError if there is none, or several."""
    points = spec["points"]
    if name not in points:
        raise InputError(
            f"{where} {name!r}: no point of this file; there are {', '.join(filter(None, points)) or 'none with names'}"
        )
    found = expand(
        name, points[name], base, {**spec, "grid": {flag: [value] for flag, value in grid.items()}}
    )
    if len(found) > 1:
        raise InputError(
            f"{where} {name!r}: that is {len(found)} points, {', '.join(v.label for v in found[:3])}, …; "
            "name one with a single value of each flag"
        )
    return found[0]


def point_called(
    where: str, name: str, v: Variant, variants: list[Variant], base: dict, spec: dict
) -> Variant:
    """The point of base_train with this label or, of the points of this name, the one at the place of the grid where v stands."""
    found = next((other for other in variants if other.label == name), None)
    if not found:
        place = {flag: value for flag, value in combination(v, spec).items() if flag not in v.table}
        label = at_same_place(where, name, place, base, spec).label
        found = next((other for other in variants if other.label == label), None)
        if not found:
            raise InputError(
                f"{where} {name!r}: there is no run {label}; a flag of [grid] that this point sets itself leaves open which one is meant"
            )
    if found.script != "base_train":
        raise InputError(
            f"{where} {name!r}: is itself a run of {found.script}; name a point that starts from scratch"
        )
    return found


def resolve_budget(v: Variant, base: dict, spec: dict):
    """A budget that names a point becomes that point's number of parameters, so that no run has to wait for another."""
    budget = str(v.flags.get("budget-params", ""))
    if not budget or budget.replace("_", "").isdigit():
        return
    other = at_same_place(f"point {v.label}: budget-params", budget, combination(v, spec), base, spec)
    if other.flags.get("budget-params"):
        raise InputError(
            f"point {v.label}: budget-params {budget!r}: that point has a budget itself; name the point that it refers to"
        )
    v.flags["budget-params"] = count_parameters(resolved(other)[1])


def pair_up(variants: list[Variant], base: dict, spec: dict):
    """Give every low-rank point its full-rank partner, adding the partners that are not there, just before their first."""
    known = {identity(v): v for v in reversed(variants)}
    for v in list(variants):
        if v.paired_with:
            partner = at_same_place(
                f"point {v.label}: paired-with", v.paired_with, combination(v, spec), base, spec
            )
            resolve_budget(partner, base, spec)
            partner.seeds = []
        elif spec.get("baseline", True) and not v.base and low_rank(v):
            flags = {flag: value for flag, value in v.flags.items() if flag not in RANK_FLAGS}
            own = [flag for flag in flags if flag in v.own]
            label = "_".join(["full", *(short(flag, flags[flag]) for flag in own)])
            label = (
                label.replace("full", "full-rank", 1)
                if any(label == other.label for other in variants)
                else label
            )
            partner = Variant({}, label, flags, [], v.processes, set(own))
        else:
            continue
        if identity(partner) not in known:
            known[identity(partner)] = partner
            variants.insert(variants.index(v), partner)
        v.partner = known[identity(partner)]
        v.partner.seeds += [seed for seed in v.seeds if seed not in v.partner.seeds]


def merge_equal(variants: list[Variant]) -> tuple[list[Variant], list]:
    """Points that are the same run, as where scans cross, become one, under all their seeds. Returns (points, [(name, name of the first)])."""
    first = {}
    same = []
    for v in variants:
        kept = first.setdefault(identity(v), v)
        if kept is not v:
            same.append((v.label, kept.label))
            kept.seeds += [seed for seed in v.seeds if seed not in kept.seeds]
            kept.partner = kept.partner or v.partner
    for v in first.values():
        v.partner = v.partner and first[identity(v.partner)]
        v.base = v.base and first[identity(v.base)]
    return list(first.values()), same


def make_point(sweep: str, v: Variant, seed: int) -> Point:
    args, config, plan = resolved(v)
    tag = tag_of(sweep, v.label, seed)
    base = tag_of(sweep, v.base.label, seed if seed in v.base.seeds else v.base.seeds[0]) if v.base else ""
    every = {
        "save-every": max(1, plan["num_iterations"] // 10),
        "keep": 1,
        **v.flags,
        "resume": "auto",
    }  # a tenth of a run is what a power cut may cost
    tags = {"model-tag": base, "run-tag": tag} if base else {"model-tag": tag}
    argv = to_argv({**known(every, v), "seed": seed, **tags})
    varying = tuple(
        flag if value is True else f"{flag}={value}"
        for flag, value in v.flags.items()
        if flag in v.own and value is not False
    )
    pair = tag_of(sweep, v.partner.label, seed) if v.partner else ""
    return Point(
        tag,
        v.label,
        seed,
        argv,
        v.processes,
        varying,
        pair,
        flags_of(v.script, argv),
        config,
        plan,
        v.script,
        base,
    )


def make_evals(sweep: str, variants: list[Variant], base: dict, spec: dict) -> tuple[Eval, ...]:
    """Each of the first seed of its point. InputError where its script refuses its flags."""
    made = []
    for name, table in spec["evals"].items():
        check_eval(name, table)
        anywhere = Variant(
            {}, "", {**base, **{flag: values[0] for flag, values in spec["grid"].items()}}, [], 1
        )
        v = point_called(f"[evals.{name}]: base", table["base"], anywhere, variants, base, spec)
        tag = tag_of(sweep, v.label, v.seeds[0])
        argv = to_argv(
            {"model-tag": tag, **{flag: value for flag, value in table.items() if flag not in POINTS_OWN}}
        )
        try:
            flags_of(table["script"], argv)
        except InputError as e:
            raise InputError(f"[evals.{name}]: {e}") from None
        made.append(Eval(name, tag, table["script"], argv))
    return tuple(made)
