"""An experiment file: a question with several axes, read into the runs that answer it.

    vocabulary, text, steps, …   [flags]         flags of scripts.base_train, written as on the command line, the same in every run
    what is compared             [points.NAME]   flags of one point; a list of values makes one point of each (all combinations)
    what all points vary in      [grid]          lists of values: every point at every combination of them
    seeds = [1, 2]                               every point under each seed; a point may have seeds of its own
    baseline = true                              every low-rank run has its full-rank partner: the same flags without those of the
                                                 ranks, under the same seed; `paired-with = "NAME"` in a point names another partner
    processes = 1                                of one run, started by torchrun where there are several
    budget-params = "NAME"                       in a point: as many parameters as the point NAME of this file has
    question, cost                               a line each, for the reader
    [preset.NAME]                                any of these again; what it says replaces or adds to what stands above

dev/experiments/ has examples.
"""
import itertools
import os
import re
from argparse import Namespace
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from nanochat import metrics
from nanochat.common import InputError, get_base_dir
from nanochat.dataset import HUB_SETS
from nanochat.experiment_file import check_flags, check_point, choose_preset, load_toml, nearest, whole_numbers
from nanochat.gpt import GPTConfig
from nanochat.plan import parse_flags, solve_budget, training_plan
from nanochat.rank import count_parameters

RANK_FLAGS = ("attn-rank", "mlp-rank", "lm-head-rank", "matrix-ranks", "rank-schedule", "rank-end", "budget-params", "solve",
              "factor-act", "recompute")
SHORT = {"attn-rank": "attn", "mlp-rank": "mlp", "lm-head-rank": "head", "matrix-lr": "lr", "depth": "d", "model-dim": "w", "rank-schedule": "",
         "rank-end": "end", "budget-params": "budget", "max-seq-len": "t", "total-batch-size": "batch", "num-iterations": "steps"}


@dataclass(frozen=True)
class Point:
    """One run: a point of the experiment under one seed."""
    tag: str                  # of the run folder: <sweep>_<label>_s<seed>
    label: str                # what tells it from the other points: "medium", "scan_lr0.02"
    seed: int
    argv: tuple[str, ...]     # for scripts.base_train, complete but for --run
    processes: int
    varying: tuple[str, ...]  # "attn-rank=64", …: the flags that not all points share
    pair: str                 # tag of its full-rank partner; "" where it has none
    args: Namespace           # argv as base_train reads it
    config: GPTConfig         # the model
    plan: dict                # see nanochat.plan.training_plan

    @property
    def folder(self) -> Path:
        return metrics.runs_dir() / self.tag

    def status(self) -> str:
        """'new', or what the run folder says: 'running' (or killed), 'stopped', 'finished'."""
        if not (self.folder / "config.json").exists():
            return "new"
        summary = self.folder / "summary.json"
        return metrics.read_json(summary).get("status", "running") if summary.exists() else "running"


@dataclass(frozen=True)
class Sweep:
    """An experiment as it is to be run: all points, in the order in which they should be."""
    name: str                 # of the file, and of the preset if one is chosen: "low_rank_substitution-small"
    file: Path
    preset: str               # "" if the file has none
    question: str
    cost: str
    data: str
    vocab_size: int
    processes: int            # of each run
    points: tuple[Point, ...]
    same: tuple[tuple[str, str], ...] = ()  # (label, label of the point that is the same run)

    @property
    def folder(self) -> Path:
        """Logs, scripts and the report of this sweep. The runs themselves are where all runs are."""
        return get_base_dir() / "sweeps" / self.name

    def point(self, tag: str) -> Point:
        for point in self.points:
            if point.tag == tag:
                return point
        raise InputError(f"--task {tag}: {self.file} has no such point{nearest(tag, [p.tag for p in self.points])}; --plan lists them")


@dataclass
class Variant:
    """A point before its seeds are dealt out."""
    label: str
    flags: dict                                         # flag -> value, as in the file
    seeds: list[int]
    processes: int
    own: set[str] = field(default_factory=set)          # flags that are its own: not the same in all points
    paired_with: str = ""                               # the point that its full-rank partner is a case of; "": made from its own flags
    partner: "Variant | None" = None


# ---- from a file to points ------------------------------------------------------------------------------------------

def read_experiment(path: Path, preset: str = "", data: str = "") -> Sweep:
    """All points of an experiment file. data: the text, in place of the file's.

    InputError, one line: an unknown key, flag or preset, a value that a flag refuses, an impossible model or horizon, two
    points of one name. Depends on the file and the arguments alone.
    """
    path = Path(path)
    spec = choose_preset(load_toml(path), preset, path)
    try:
        return plan_sweep(spec, path, preset, data)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


def plan_sweep(spec: dict, path: Path, preset: str, data: str) -> Sweep:
    spec = {"flags": {}, "grid": {}, "seeds": [], "processes": 1, **spec, "points": spec.get("points") or {"": {}}}
    base = spec["flags"]
    check_flags("[flags]", base, lists=False)
    check_flags("[grid]", spec["grid"], shared=False, scalars=False)
    for name, table in spec["points"].items():
        check_point(name, table)
    whole_numbers("seeds", spec["seeds"], 0)
    whole_numbers("processes", [spec["processes"]], 1)
    if "vocab-size" not in base:
        raise InputError("[flags]: vocab-size is missing; the tokenizer of the sweep is trained with it, for example vocab-size = 4096")
    base = {**base, "data": where_text_is(data or str(base.get("data", "stdlib")))}

    variants = [v for name, table in spec["points"].items() for v in expand(name, table, base, spec)]
    for v in variants:
        resolve_budget(v, base, spec)
    pair_up(variants, base, spec)
    variants, same = merge_equal(variants)
    name = f"{file_name(path.stem)}-{preset}" if preset else file_name(path.stem)
    check_names(name, variants)
    points = [make_point(name, v, seed) for seed in dict.fromkeys(s for v in variants for s in v.seeds)
              for v in variants if seed in v.seeds]  # all of one seed near one another in time
    return Sweep(name, path, preset, spec.get("question", ""), spec.get("cost", ""), base["data"], points[0].args.vocab_size,
                 spec["processes"], tuple(points), tuple(same))


# ---- points ---------------------------------------------------------------------------------------------------------

def where_text_is(data: str) -> str:
    """A folder by its absolute path, so that the same command from elsewhere means the same run; names as they are."""
    return data if data in ("stdlib", *HUB_SETS) else os.path.abspath(os.path.expanduser(data))


def check_names(sweep: str, variants: list[Variant]):
    by_label = {}
    for v in variants:
        other = by_label.setdefault(v.label.lower(), v)  # some file systems do not tell a from A
        if other is not v:
            differing = sorted(f for f in {**v.flags, **other.flags} if v.flags.get(f) != other.flags.get(f))
            raise InputError(f"two points are named {v.label or 'the same'}, with other values of {', '.join(differing)}; rename one")
        if len(tag_of(sweep, v.label, max(v.seeds))) > 150:
            raise InputError(f"point {v.label}: this name is too long for a folder")


def expand(name: str, table: dict, base: dict, spec: dict) -> list[Variant]:
    """A point at every combination of its lists and of the grid; a flag of its own is not taken from the grid."""
    own = {k: v for k, v in table.items() if k not in ("seeds", "paired-with")}
    axes = {**{k: v for k, v in own.items() if isinstance(v, list)}, **{k: v for k, v in spec["grid"].items() if k not in own}}
    seeds = whole_numbers(f"[points.{name}]: seeds", table.get("seeds", spec["seeds"]), 0)
    if not seeds:
        raise InputError(f"{f'[points.{name}]: ' if name else ''}no seeds: write for example seeds = [1, 2]")
    variants = []
    for values in itertools.product(*axes.values()):
        varied = dict(zip(axes, values))
        label = "_".join(filter(None, [name, *(short(flag, value) for flag, value in varied.items())]))
        variants.append(Variant(label, {**base, **own, **varied}, list(seeds), spec["processes"], {*own, *axes}, table.get("paired-with", "")))
    return variants


def short(flag: str, value) -> str:
    """An axis in a name: lr0.02, attn64, d8."""
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    return f"{SHORT.get(flag, flag)}{file_name(str(value))}"


def file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def tag_of(sweep: str, label: str, seed: int) -> str:
    return "_".join(filter(None, [sweep, label, f"s{seed}"]))


def combination(v: Variant, spec: dict) -> dict:
    """The part of the grid that it stands at."""
    return {flag: v.flags[flag] for flag in spec["grid"]}


def at_same_place(where: str, name: str, grid: dict, base: dict, spec: dict) -> Variant:
    """The point `name` at a place of the grid. InputError if there is none, or several."""
    points = spec["points"]
    if name not in points:
        raise InputError(f"{where} {name!r}: no point of this file; there are {', '.join(filter(None, points)) or 'none with names'}")
    found = expand(name, points[name], base, {**spec, "grid": {flag: [value] for flag, value in grid.items()}})
    if len(found) > 1:
        raise InputError(f"{where} {name!r}: that is {len(found)} points, {', '.join(v.label for v in found[:3])}, …; "
                         "name one with a single value of each flag")
    return found[0]


def resolve_budget(v: Variant, base: dict, spec: dict):
    """A budget that names a point becomes that point's number of parameters, so that no run has to wait for another."""
    budget = str(v.flags.get("budget-params", ""))
    if not budget or budget.replace("_", "").isdigit():
        return
    other = at_same_place(f"point {v.label}: budget-params", budget, combination(v, spec), base, spec)
    if other.flags.get("budget-params"):
        raise InputError(f"point {v.label}: budget-params {budget!r}: that point has a budget itself; name the point that it refers to")
    v.flags["budget-params"] = count_parameters(resolved(other)[1])


def pair_up(variants: list[Variant], base: dict, spec: dict):
    """Give every low-rank point its full-rank partner, adding the partners that are not there, just before their first."""
    known = {identity(v): v for v in reversed(variants)}
    for v in list(variants):
        if v.paired_with:
            partner = at_same_place(f"point {v.label}: paired-with", v.paired_with, combination(v, spec), base, spec)
            resolve_budget(partner, base, spec)
            partner.seeds = []
        elif spec.get("baseline", True) and low_rank(v):
            flags = {flag: value for flag, value in v.flags.items() if flag not in RANK_FLAGS}
            own = [flag for flag in flags if flag in v.own]
            label = "_".join(["full", *(short(flag, flags[flag]) for flag in own)])
            label = label.replace("full", "full-rank", 1) if any(label == other.label for other in variants) else label
            partner = Variant(label, flags, [], v.processes, set(own))
        else:
            continue
        if identity(partner) not in known:
            known[identity(partner)] = partner
            variants.insert(variants.index(v), partner)
        v.partner = known[identity(partner)]
        v.partner.seeds += [seed for seed in v.seeds if seed not in v.partner.seeds]


def low_rank(v: Variant) -> bool:
    config = resolved(v)[1]
    return any(map(any, (config.attn_ranks, config.mlp_ranks, (config.lm_head_rank,), *config.matrix_ranks.values())))


def merge_equal(variants: list[Variant]) -> tuple[list[Variant], list]:
    """Points that are the same run, as where scans cross, become one, under all their seeds. Returns (points, [(name, name of the first)])."""
    first, same = {}, []
    for v in variants:
        kept = first.setdefault(identity(v), v)
        if kept is not v:
            same.append((v.label, kept.label))
            kept.seeds += [seed for seed in v.seeds if seed not in kept.seeds]
            kept.partner = kept.partner or v.partner
    for v in first.values():
        v.partner = v.partner and first[identity(v.partner)]
    return list(first.values()), same


def make_point(sweep: str, v: Variant, seed: int) -> Point:
    _, config, plan = resolved(v)
    tag = tag_of(sweep, v.label, seed)
    saving = {"save-every": max(1, plan["num_iterations"] // 10), "keep": 1}  # a tenth of a run is what a power cut may cost
    argv = to_argv({**saving, **v.flags, "seed": seed, "model-tag": tag, "resume": "auto"})
    varying = tuple(flag if value is True else f"{flag}={value}" for flag, value in v.flags.items() if flag in v.own and value is not False)
    pair = tag_of(sweep, v.partner.label, seed) if v.partner else ""
    return Point(tag, v.label, seed, argv, v.processes, varying, pair, parse_flags(argv), config, plan)


def to_argv(flags: dict) -> tuple[str, ...]:
    """Flags as base_train takes them: a switch stands alone, or not at all."""
    return tuple(word for flag, value in flags.items() if value is not False
                 for word in ((f"--{flag}",) if value is True else (f"--{flag}", str(value))))


# ---- what base_train makes of it ------------------------------------------------------------------------------------

def identity(v: Variant) -> tuple:
    """Equal for points that are the same run: all flags, the defaults of those not given included."""
    return tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in vars(resolved(v)[0]).items()))


def resolved(v: Variant) -> tuple[Namespace, GPTConfig, dict]:
    """(flags, model, plan) as base_train would have them. InputError names the point and says what base_train would say."""
    try:
        return resolve(to_argv(v.flags), v.processes)
    except InputError as e:
        raise InputError(f"point {v.label or '(all)'}: {e}") from None


@cache
def resolve(argv: tuple[str, ...], processes: int) -> tuple[Namespace, GPTConfig, dict]:
    args = parse_flags(list(argv))
    if args.vocab_size < 1:
        raise InputError(f"--vocab-size {args.vocab_size}: give the number of tokens of the vocabulary, at least 258")
    config = solve_budget(args, args.vocab_size)
    return args, config, training_plan(args, config, processes)
