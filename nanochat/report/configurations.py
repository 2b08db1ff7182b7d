"""Runs grouped into configurations: the runs of one configuration differ in the seed alone.

A configuration is described by its settings, each by the name of its flag, and named by the settings in which
it differs from the others.
"""

import functools
import shlex
from dataclasses import dataclass
from statistics import median

from nanochat.flag_types import Role
from nanochat.flags import OLD_DEFAULTS, SHAPE_FLAGS, build_parser, flag_names
from nanochat.history import series
from nanochat.metrics import Run
from nanochat.naming import base_name, method, method_with_size
from nanochat.rank import resolve_rank, shortest_ranks_text
from nanochat.units import is_finite

# flags that change neither the model, nor its training, nor its cost
IGNORED = set(flag_names(Role.NAME, Role.NEUTRAL))
# flags whose resolved values the run records elsewhere: among its derived values, or with its device
RESOLVED = set(flag_names(Role.PLACE, Role.REQUEST))
MODEL_FLAGS = {  # key of the recorded model -> name of its flag
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
    """Runs that differ only in the seed and in flags without an effect, such as names."""

    name: str  # distinguishes it from the other configurations: "attn 96, mlp 96", or "full rank"
    runs: tuple[Run, ...]  # ordered by seed
    low_rank: bool  # any rank above 0
    settings: dict  # flag -> resolved value; a rank is a number, or "100-50-20-5" if it varies over depth
    method: str = ""  # "LoRA", "Fastfood", … of an adapter or a subspace; "" of an ordinary run

    @property
    def full_rank(self) -> bool:
        """Full rank, every number trained from scratch: the baseline of low rank."""
        return not self.low_rank and not self.method

    def values(self, key: str) -> list[float]:
        """Finite values of a summary key, or of step_time (seconds), over the finished runs."""
        values = [run_value(run, key) for run in self.runs if finished(run)]
        return [value for value in values if value is not None]

    def mean(self, key: str) -> float | None:
        values = self.values(key)
        return sum(values) / len(values) if values else None


# ---- one run -----------------------------------------------------------------------------------------------


def finished(run: Run) -> bool:
    return run.summary.get("status") == "finished"


def run_value(run: Run, key: str) -> float | None:
    """A finite number of the summary, or step_time (seconds); None if it is missing or not finite."""
    value = step_seconds(run) if key == "step_time" else run.summary.get(key)
    return value if is_finite(value) else None


def step_seconds(run: Run) -> float | None:
    """The median of train/dt (seconds a step) after the first 10 steps, or in a short run after the first."""
    times = [seconds for (seconds,) in series(run.history, "train/dt") if seconds is not None]
    times = times[10:] or times[1:]
    return median(times) if times else None


def run_seed(run: Run) -> int:
    return run.config.get("seed", run.config.get("flags", {}).get("seed", 0))


def settings(run: Run, defaults: dict) -> dict:
    """{flag: resolved value} of all flags with an effect on the run. A value: number, text, boolean or None.

    A budget appears as the depth and the ranks that it gave, -1 as the value that it stood for, data as their
    fingerprints. The machine is included. defaults: values of the flags that the run's version did not have.
    """
    flags = run.config.get("flags", {})
    derived = run.config.get("derived", {})
    device = run.config.get("device", {})
    model = derived.get("model", {})
    corpus = derived.get("corpus", {})
    values = {key: value for key, value in (defaults | flags).items() if key not in IGNORED | RESOLVED}
    values |= model_settings(model)
    grouped_queries = model.get("n_kv_head") != model.get("n_head")
    for key in RANKS:
        # with grouped queries, one fraction in attention stands for two ranks, so it stays a fraction
        if key in values and not (key == "attn_rank" and grouped_queries):
            values[key] = resolved_ranks(values[key], model, key)
    values["rank_multiple"] = effective_multiple(model)
    if flags.get("solve") == "rank" and model.get("matrix_ranks"):
        values["matrix_ranks"] = shortest_ranks_text(model["matrix_ranks"])
    if model.get("n_head"):
        values["head_dim"] = model["n_embd"] // model["n_head"]
    values |= {key: derived[key] for key in PLAN if key in derived}
    values |= {f"{split}_fingerprint": corpus.get(f"{split}_fingerprint") for split in ("train", "val")}
    values |= {key: device.get(key.removeprefix("device_")) for key in MACHINE}
    if flags.get("adapter"):
        values["base"] = base_name(flags)
        if flags.get("layer_map"):  # the recorded model may be the base, without the layer map
            values["layer_map"] = flags["layer_map"]
    return {key: setting_text(key, value) for key, value in values.items()}


def model_settings(model: dict) -> dict:
    """The recorded model by names of flags, without the keys that settings() resolves itself."""
    left_out = {"n_head", "matrix_ranks", "rank_multiple"}
    if not model.get("layer_kinds"):  # only models with copied layers have it; older runs lack the key
        left_out.add("layer_kinds")
    return {MODEL_FLAGS.get(key, key): value for key, value in model.items() if key not in left_out}


def setting_text(key: str, value):
    """A list as text, so that settings can be compared, counted and printed; other values as they are."""
    if key in RANKS:
        return rank_over_depth(value)
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value


def rank_over_depth(ranks) -> float | str:
    """0 for full rank, a number for one rank in every layer, else "100-50-20-5"."""
    if not isinstance(ranks, (list, tuple)):
        return ranks
    if len(set(ranks)) < 2:
        return ranks[0] if ranks else 0
    return "-".join(f"{rank:g}" for rank in ranks)


def resolved_ranks(ranks, model: dict, group: str):
    """A group's rank, or its list of ranks by layer, with fractions of the smaller side as whole numbers."""
    matrix = "up" if group == "mlp_rank" else "q"
    if isinstance(ranks, (list, tuple)):
        return [resolved_rank(rank, model, matrix) for rank in ranks]
    return resolved_rank(ranks, model, matrix)


def resolved_rank(rank, model: dict, matrix: str):
    if not (rank and 0 < rank < 1):
        return rank
    side = smaller_side(model, matrix)
    return resolve_rank(rank, side, side, model.get("rank_multiple", 1))


def smaller_side(model: dict, matrix: str) -> int:
    """min(in, out) of q, k, v, o, up or down."""
    if matrix in ("k", "v"):
        return model["n_embd"] // model["n_head"] * model["n_kv_head"]
    if matrix in ("up", "down"):
        return min(model["n_embd"], round(model.get("mlp_ratio", 4) * model["n_embd"]))
    return model["n_embd"]


def effective_multiple(model: dict) -> int:
    """--rank-multiple if it rounds a rank that the settings keep as a fraction, else 1.

    The settings keep fractions of single matrices, and with grouped queries those of attention.
    """
    multiple = model.get("rank_multiple", 1)
    ranks_by_matrix = dict(model.get("matrix_ranks") or {})
    if model.get("n_kv_head") != model.get("n_head"):
        ranks_by_matrix = dict.fromkeys("qkvo", model.get("attn_ranks") or ()) | ranks_by_matrix
    for matrix, ranks in ranks_by_matrix.items():
        for rank in set(ranks):
            side = smaller_side(model, matrix) if 0 < rank < 1 else 0
            if side and resolve_rank(rank, side, side, multiple) != resolve_rank(rank, side, side):
                return multiple
    return 1


@functools.cache
def flag_defaults() -> dict:
    return vars(build_parser().parse_args([])) | OLD_DEFAULTS


# ---- many runs ---------------------------------------------------------------------------------------------


def configurations(runs: list[Run]) -> list[Configuration]:
    """The runs by configuration, in the order of their first appearance."""
    flags = [run.config.get("flags", {}).keys() for run in runs]
    same_version = all(names == flags[0] for names in flags)
    defaults = {} if same_version else flag_defaults()
    groups: list[tuple[dict, list[Run]]] = []
    for run in runs:
        run_settings = settings(run, defaults)
        for group_settings, members in groups:
            if group_settings == run_settings:
                members.append(run)
                break
        else:
            groups.append((run_settings, [run]))
    all_settings = [group_settings for group_settings, _ in groups]
    names = short_names(all_settings, [members[0].name for _, members in groups])
    return [make_configuration(name, *group) for name, group in zip(names, groups)]


def make_configuration(name: str, settings: dict, runs: list[Run]) -> Configuration:
    kind = method(settings)
    low_rank = not kind and any(settings.get(key) for key in (*RANKS, "matrix_ranks"))
    return Configuration(name, tuple(sorted(runs, key=run_seed)), low_rank, settings, kind)


def short_names(all_settings: list[dict], tags: list[str]) -> list[str]:
    """A name for each configuration: ranks or method, then differing settings until the names differ.

    tags: the tag of one run of each configuration. It distinguishes configurations whose names stay equal.
    """
    mixed_scripts = len({bool(each.get("adapter")) for each in all_settings}) > 1
    names = [[rank_name(each)] for each in all_settings]
    for key in naming_order(all_settings):
        if not tells_apart(key, names, all_settings):
            continue
        for name, each in zip(names, all_settings):
            # one of the two scripts may not have the flag: "unset" would mislead
            unknown = mixed_scripts and each.get(key) is None
            name.append("" if unknown else setting_name(key, each.get(key)))
    joined = [", ".join(filter(None, name)) for name in names]
    return [name if joined.count(name) == 1 else f"{name} ({tag})" for name, tag in zip(joined, tags)]


def naming_order(all_settings: list[dict]) -> list[str]:
    """The settings that can follow the ranks in a name, in the order in which they are tried."""
    first = ["depth", "model_dim", "rank_schedule", "matrix_lr"]
    rank_name_keys = {*RANKS, "matrix_ranks", "factor_act", "mlp_ratio"}
    return first + sorted(set().union(*all_settings) - set(first) - rank_name_keys)


def tells_apart(key: str, names: list[list[str]], all_settings: list[dict]) -> bool:
    """Whether two configurations whose names are still equal differ in this setting.

    Depth and width are in the names whenever they vary.
    """
    values_by_name: dict[tuple, set] = {}
    for name, each in zip(names, all_settings):
        values_by_name.setdefault(tuple(name), set()).add(each.get(key))
    if any(len(values) > 1 for values in values_by_name.values()):
        return True
    return key in ("depth", "model_dim") and len({each.get(key) for each in all_settings}) > 1


def rank_name(settings: dict) -> str:
    """The ranks in words: "attn 96, mlp 96", "mlp 96, v 128, silu", "full rank".

    Over more than six layers: "attn 100…5". An MLP that is not four times as wide as the model follows: "full
    rank, MLP × 1.5". Another method is named with its size: "LoRA 8".
    """
    if method(settings):
        return method_with_size(settings)
    parts = []
    for key, label in zip(RANKS, ("attn", "mlp", "head")):
        if rank := settings.get(key):
            parts.append(f"{label} {rank_text(rank)}")
    parts += [matrix_rank_name(part) for part in (settings.get("matrix_ranks") or "").split(",") if part]
    if parts and settings.get("factor_act", "none") != "none":
        parts.append(settings["factor_act"])
    if not parts:
        parts.append("full rank")
    ratio = settings.get("mlp_ratio") or 4
    if ratio != 4:
        parts.append(f"MLP × {ratio:g}")
    return ", ".join(parts)


def rank_text(rank: float | str) -> str:
    if not isinstance(rank, str):
        return f"{rank:g}"
    ranks = rank.split("-")
    return f"{ranks[0]}…{ranks[-1]}" if len(ranks) > 6 else rank


def matrix_rank_name(part: str) -> str:
    """'v=128' -> 'v 128'. Of more than six ranks, one a layer, the first and the last: 'v 128…16'."""
    name, _, ranks = part.partition("=")
    layers = ranks.split("/")
    return f"{name} {layers[0]}…{layers[-1]}" if len(layers) > 6 else f"{name} {ranks}"


def setting_name(key: str, value) -> str:
    words = key.replace("_", " ")
    if value is None:
        return f"{words} unset"  # in a run whose version did not have the flag
    if isinstance(value, bool):
        return words if value else f"no {words}"
    if value == "":
        return ""  # for example: no layer map
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return {
        "depth": f"{text} layers",
        "model_dim": f"width {text}",
        "rank_schedule": text,
        "device_name": f"on {text}",
        "threads": f"{text} threads",
        "processes": f"{text} processes",
    }.get(key, f"{words} {text}")


def varying_settings(configs: list[Configuration]) -> dict[str, list]:
    """{flag: distinct values} of the settings that differ between configurations, numbers before words."""
    varying = {}
    keys = [key for config in configs for key in config.settings]
    for key in dict.fromkeys(keys):
        distinct = dict.fromkeys(config.settings.get(key) for config in configs)
        if len(distinct) > 1:
            varying[key] = sorted(distinct, key=numbers_first)
    return varying


def numbers_first(value) -> tuple:
    """Sorts a mixed list: numbers by size, then all else as text."""
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0, str(value))


# ---- flags to paste ----------------------------------------------------------------------------------------


def paste_flags(config: Configuration) -> str:
    """The flags that make these runs again, shell-quoted, without defaults, tag, W&B name and seed."""
    run = config.runs[0]
    flags = run.config.get("flags", {})
    if flags.get("adapter"):
        return f"(behind python -m scripts.adapter_train) {adapter_words(flags)}"
    if "materialized_from" in flags:
        return f"made by scripts.materialize from {flags['materialized_from']}"
    return base_train_words(run, flags)


def adapter_words(flags: dict) -> str:
    words = []
    for key, value in flags.items():
        if key in ("run", "run_tag", "seed", "resume") or value in (None, False, ""):
            continue
        words.append(flag_word(key))
        if value is not True:
            words.append(shlex.quote(str(value)))
    return " ".join(words)


def base_train_words(run: Run, flags: dict) -> str:
    defaults = vars(build_parser().parse_args([]))
    words = []
    # today's default may differ from the one that an older run was made with
    for key, value in (OLD_DEFAULTS | flags).items():
        if key in ("run", "model_tag", "seed", "resume", "dry_run") or value is None:
            continue
        if key in defaults and value == defaults[key]:
            continue
        if flags.get("init_from") and key in SHAPE_FLAGS:
            continue  # the checkpoint has the shape, and --init-from refuses these flags
        if key == "budget_params" and not str(value).replace("_", "").isdigit():
            # the name of a run, which may not exist where the flags are pasted
            value = run.summary.get("params/total", value)
        words.append(flag_word(key))
        if isinstance(value, list) and value:
            words.append(",".join(f"{number:g}" for number in value if isinstance(number, (int, float))))
        elif value is not True:
            words.append(shlex.quote(str(value)))
    return " ".join(words)


def flag_word(key: str) -> str:
    return shlex.quote("--" + key.replace("_", "-"))
