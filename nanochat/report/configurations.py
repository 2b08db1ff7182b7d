"""Many runs as configurations: which runs differ in the seed alone, what tells the others apart, which of them nothing beats."""

import functools
import math
import shlex
from dataclasses import dataclass
from statistics import median

from nanochat.flag_types import Role
from nanochat.flags import DEFAULTS_BEFORE, SHAPE_FLAGS, build_parser, flag_names
from nanochat.history import series
from nanochat.metrics import Run
from nanochat.naming import base_name, method, with_size
from nanochat.whole_ranks import resolve_rank, shortest_ranks_text

# Flags that change neither the model nor its training nor what it costs ...
IGNORED = set(flag_names(Role.NAME, Role.NEUTRAL))
# ... and those that the run's derived values, and its device, say better: what was asked for here is resolved there.
RESOLVED = set(flag_names(Role.PLACE, Role.REQUEST))
MODEL_FLAGS = {
    "n_layer": "depth",
    "n_embd": "model_dim",
    "sequence_len": "max_seq_len",
    "attn_ranks": "attn_rank",
    "mlp_ranks": "mlp_rank",
}
PLAN = ("num_iterations", "total_batch_size", "matrix_lr", "tokenizer_hash", "val_tokens")
RANKS = flag_names(Role.GROUP_RANK)
MACHINE = ("device_type", "device_name", "dtype", "processes", "threads")


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but the seed (and free things such as names)."""

    name: str  # short: what tells it from the other configurations, e.g. "attn 96, mlp 96"; "full rank" where that is all
    runs: tuple[Run, ...]  # ordered by seed
    low_rank: bool  # any rank above 0
    settings: dict  # flag (underscored) -> what it was resolved to; a rank is a number, or "100-50-20-5" where it varies over depth
    method: str = ""  # "LoRA", "Fastfood", … of runs that train a part of their numbers, or a trained model; "" of ordinary ones

    @property
    def full_rank(self) -> bool:
        """An ordinary run without low rank: what low rank is compared with."""
        return not self.low_rank and not self.method

    def values(self, key: str) -> list[float]:
        """Finite values of a summary key, or of step_time (seconds), over the finished runs."""
        return [v for run in self.runs if finished(run) and (v := run_value(run, key)) is not None]

    def mean(self, key: str) -> float | None:
        found = self.values(key)
        return sum(found) / len(found) if found else None


# ---- one run --------------------------------------------------------------------------------------------------------


def finished(run: Run) -> bool:
    return run.summary.get("status") == "finished"


def run_value(run: Run, key: str) -> float | None:
    """A finite number of the summary, or step_time (seconds); None where there is none."""
    number = step_seconds(run) if key == "step_time" else run.summary.get(key)
    return (
        number
        if isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
        else None
    )


def step_seconds(run: Run) -> float | None:
    """Median of train/dt, seconds a step, after the first 10 steps (of a shorter run: all but the first)."""
    times = [seconds for (seconds,) in series(run.history, "train/dt") if seconds is not None]
    times = times[10:] or times[1:]
    return median(times) if times else None


def run_seed(run: Run) -> int:
    return run.config.get("seed", run.config.get("flags", {}).get("seed", 0))


def settings(run: Run, defaults: dict) -> dict:
    """What shaped the run, by the names of the flags, as resolved: a budget as the depth and ranks it gave, -1 as what it stood for,
    the data by their fingerprints; and the machine. defaults: of flags that the run's version did not have.
    """
    derived = run.config.get("derived", {})
    device = run.config.get("device", {})
    model = derived.get("model", {})
    corpus = derived.get("corpus", {})
    flags = run.config.get("flags", {})
    found = {k: v for k, v in (defaults | flags).items() if k not in IGNORED | RESOLVED}
    unsaid = {"n_head", "matrix_ranks", "rank_multiple"}
    if not model.get("layer_kinds"):
        unsaid.add("layer_kinds")  # of copied layers alone; older runs lack it
    found |= {MODEL_FLAGS.get(k, k): v for k, v in model.items() if k not in unsaid}
    found |= {
        k: resolved_ranks(found[k], model, k)
        for k in RANKS
        if k in found and (k != "attn_rank" or model.get("n_kv_head") == model.get("n_head"))
    }
    found["rank_multiple"] = multiple_in_use(model)
    if flags.get("solve") == "rank" and model.get("matrix_ranks"):
        found["matrix_ranks"] = shortest_ranks_text(model["matrix_ranks"])
    if model.get("n_head"):
        found["head_dim"] = model["n_embd"] // model["n_head"]
    found |= {k: derived[k] for k in PLAN if k in derived}
    found |= {f"{split}_fingerprint": corpus.get(f"{split}_fingerprint") for split in ("train", "val")}
    found |= {key: device.get(key.removeprefix("device_")) for key in MACHINE}
    if flags.get("adapter"):
        found["base"] = base_name(flags)
        found |= (
            {"layer_map": flags["layer_map"]} if flags.get("layer_map") else {}
        )  # the model on record may be the base alone
    return {
        k: rank_over_depth(v) if k in RANKS else ",".join(map(str, v)) if isinstance(v, (list, tuple)) else v
        for k, v in found.items()
    }


def resolved_ranks(ranks, model: dict, group: str):
    """Fractions of the smaller side as the ranks that they are. (Under grouped queries those of attention stand for two, and stay.)"""

    def whole(rank):
        if not (rank and 0 < rank < 1):
            return rank
        side = smaller_side(model, "up" if group == "mlp_rank" else "q")
        return resolve_rank(rank, side, side, model.get("rank_multiple", 1))

    return [whole(r) for r in ranks] if isinstance(ranks, (list, tuple)) else whole(ranks)


def smaller_side(model: dict, matrix: str) -> int:
    """min(in, out) of q, k, v, o, up or down."""
    if matrix in ("k", "v"):
        return model["n_embd"] // model["n_head"] * model["n_kv_head"]
    if matrix in ("up", "down"):
        return min(model["n_embd"], round(model.get("mlp_ratio", 4) * model["n_embd"]))
    return model["n_embd"]


def multiple_in_use(model: dict) -> int:
    """--rank-multiple where it rounds a rank that the settings have as a fraction, else 1.

    They do for single matrices and, under grouped queries, for attention.
    """
    multiple = model.get("rank_multiple", 1)
    fractions = dict(model.get("matrix_ranks") or {})
    if model.get("n_kv_head") != model.get("n_head"):
        fractions = dict.fromkeys("qkvo", model.get("attn_ranks") or ()) | fractions
    for matrix, ranks in fractions.items():
        for rank in set(ranks):
            side = smaller_side(model, matrix) if 0 < rank < 1 else 0
            if side and resolve_rank(rank, side, side, multiple) != resolve_rank(rank, side, side):
                return multiple
    return 1


def rank_over_depth(ranks) -> float | str:
    """0 for full rank, a number for one rank in every layer, else "100-50-20-5"."""
    if not isinstance(ranks, (list, tuple)):
        return ranks
    return (ranks[0] if ranks else 0) if len(set(ranks)) < 2 else "-".join(f"{r:g}" for r in ranks)


@functools.cache
def flag_defaults() -> dict:
    return vars(build_parser().parse_args([])) | DEFAULTS_BEFORE


# ---- many -----------------------------------------------------------------------------------------------------------


def configurations(runs: list[Run]) -> list[Configuration]:
    """The runs by configuration, in the order of their first appearance."""
    flags = [run.config.get("flags", {}).keys() for run in runs]
    defaults = flag_defaults() if any(f != flags[0] for f in flags) else {}  # runs of different versions
    groups = []  # [(settings, [run, ...])]
    for run in runs:
        ours = settings(run, defaults)
        members = next((members for theirs, members in groups if theirs == ours), None)
        if members is None:
            groups.append((ours, members := []))
        members.append(run)
    names = short_names([s for s, _ in groups], [members[0].name for _, members in groups])
    return [
        Configuration(
            name,
            tuple(sorted(members, key=run_seed)),
            not method(s) and any(s.get(key) for key in (*RANKS, "matrix_ranks")),
            s,
            method(s),
        )
        for name, (s, members) in zip(names, groups)
    ]


def short_names(described: list[dict], tags: list[str]) -> list[str]:
    """The ranks or the method, and then one differing setting after the other until all names differ."""
    mixed = (
        len({bool(s.get("adapter")) for s in described}) > 1
    )  # of two scripts, whose flags are not the same
    names = [[rank_name(s)] for s in described]
    order = ["depth", "model_dim", "rank_schedule", "matrix_lr"]
    others = sorted(
        {key for s in described for key in s}
        - set(order)
        - set(RANKS)
        - {"matrix_ranks", "factor_act", "mlp_ratio"}
    )
    for key in order + others:
        kinds = {}  # name so far -> values of this setting among those that bear it
        for name, s in zip(names, described):
            kinds.setdefault(tuple(name), set()).add(s.get(key))
        if any(len(values) > 1 for values in kinds.values()) or (
            key in order[:2] and len({s.get(key) for s in described}) > 1
        ):
            for name, s in zip(names, described):
                name.append("" if mixed and s.get(key) is None else setting_name(key, s.get(key)))
    joined = [", ".join(filter(None, name)) for name in names]
    return [name if joined.count(name) == 1 else f"{name} ({tag})" for name, tag in zip(joined, tags)]


def rank_name(s: dict) -> str:
    """ "attn 96, mlp 96", "mlp 96, v 128, silu", "attn 100…5" over many layers, or "full rank", and then an MLP of
    another width than four: "full rank, MLP × 1.5"; "LoRA 8" of another method.
    """
    if method(s):
        return with_size(s)
    parts = []
    for key, label in zip(RANKS, ("attn", "mlp", "head")):
        rank = s.get(key)
        if isinstance(rank, str) and rank.count("-") > 5:
            rank = f"{rank.split('-')[0]}…{rank.split('-')[-1]}"
        if rank:
            parts.append(f"{label} {rank if isinstance(rank, str) else format(rank, 'g')}")
    parts += [single_name(part) for part in (s.get("matrix_ranks") or "").split(",") if part]
    parts += [s["factor_act"]] if parts and s.get("factor_act", "none") != "none" else []
    parts = parts or ["full rank"]
    ratio = s.get("mlp_ratio") or 4
    return ", ".join(parts + ([f"MLP × {ratio:g}"] if ratio != 4 else []))


def single_name(part: str) -> str:
    """'v=128' -> 'v 128'; of one rank a layer the first and the last where there are many: 'v 128…16'."""
    name, _, ranks = part.partition("=")
    layers = ranks.split("/")
    return f"{name} {layers[0]}…{layers[-1]}" if len(layers) > 6 else f"{name} {ranks}"


def setting_name(key: str, setting) -> str:
    words = key.replace("_", " ")
    if setting is None:
        return f"{words} unset"  # in a run of a version without it
    if isinstance(setting, bool):
        return words if setting else f"no {words}"
    if setting == "":
        return ""  # such as no layer map
    shown = f"{setting:g}" if isinstance(setting, float) else str(setting)
    return {
        "depth": f"{shown} layers",
        "model_dim": f"width {shown}",
        "rank_schedule": shown,
        "device_name": f"on {shown}",
        "threads": f"{shown} threads",
        "processes": f"{shown} processes",
    }.get(key, f"{words} {shown}")


def varying_settings(configs: list[Configuration]) -> dict[str, list]:
    """{flag: its distinct values, numbers in order before words} of the settings that differ between configurations."""
    found = {}
    for key in dict.fromkeys(key for c in configs for key in c.settings):
        distinct = list(dict.fromkeys(c.settings.get(key) for c in configs))
        if len(distinct) > 1:
            found[key] = sorted(
                distinct, key=lambda v: (0, v, "") if isinstance(v, (int, float)) else (1, 0, str(v))
            )
    return found


def pareto_front(points: list[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point equals or beats in both coordinates (smaller is better), by the first coordinate.

    Of points that coincide the first is kept. A point that is not finite is never among them.
    """
    front = []
    best = math.inf
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if all(map(math.isfinite, points[i])) and points[i][1] < best:
            front.append(i)
            best = points[i][1]
    return front


def paste_flags(config: Configuration) -> str:
    """The flags of scripts.base_train that make these runs, defaults left out, without tag, wandb name and seed; shell-quoted."""
    run = config.runs[0]
    defaults = vars(build_parser().parse_args([]))
    flags = run.config.get("flags", {})
    words = []
    if flags.get("adapter"):
        given = {
            key: flag
            for key, flag in flags.items()
            if key not in ("run", "run_tag", "seed", "resume") and flag not in (None, False, "")
        }
        names = {key: shlex.quote(f"--{key.replace('_', '-')}") for key in given}
        words = [
            names[key] + ("" if flag is True else f" {shlex.quote(str(flag))}") for key, flag in given.items()
        ]
        return f"(behind python -m scripts.adapter_train) {' '.join(words)}"
    if "materialized_from" in flags:
        return f"made by scripts.materialize from {flags['materialized_from']}"
    for key, given in (DEFAULTS_BEFORE | flags).items():  # an older run is made with the defaults of then
        if (
            key in ("run", "model_tag", "seed", "resume", "dry_run")
            or given is None
            or (key in defaults and given == defaults[key])
        ):
            continue
        if flags.get("init_from") and key in SHAPE_FLAGS:
            continue  # the checkpoint's, and not to be given beside it
        if key == "budget_params" and not str(given).replace("_", "").isdigit():
            given = run.summary.get(
                "params/total", given
            )  # it named a run, which need not exist where this is pasted
        words.append(shlex.quote("--" + key.replace("_", "-")))
        if given is not True:
            numbers = given if isinstance(given, list) else []
            text = ",".join(f"{v:g}" for v in numbers if isinstance(v, (int, float)))
            words.append(text if numbers else shlex.quote(str(given)))
    return " ".join(words)
