"""A point of an experiment before its seeds are dealt out, and what the scripts make of its flags: a model, a horizon, an identity."""

from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import cache

from nanochat.common import InputError
from nanochat.gpt import GPTConfig
from nanochat.layer_maps import parse_map
from nanochat.naming import option
from nanochat.plan import solve_budget, training_plan
from nanochat.sweep.schema import flag_names, flags_of


@dataclass
class Variant:
    """A point before its seeds are dealt out."""

    table: dict  # the point, as it stands in the file
    label: str  # with what varies in it
    flags: dict  # flag -> value, as in the file
    seeds: list[int]
    processes: int
    own: set[str] = field(default_factory=set)  # flags that are its own: not the same in all points
    paired_with: str = ""  # the point that its full-rank partner is a case of; "": made from its own flags
    partner: "Variant | None" = None
    script: str = "base_train"
    base: "Variant | None" = None  # the point that it starts from


def to_argv(flags: dict) -> tuple[str, ...]:
    """Flags as base_train takes them: a switch stands alone, or not at all."""
    return tuple(
        word
        for flag, value in flags.items()
        if value is not False
        for word in ((f"--{flag}",) if value is True else option(f"--{flag}", str(value)))
    )


def known(flags: dict, v: Variant) -> dict:
    """Those that the point's script has; its own ones it judges itself."""
    names = flag_names(v.script)
    return {flag: value for flag, value in flags.items() if flag in names or flag in v.table}


def identity(v: Variant) -> tuple:
    """Equal for points that are the same run: all flags, the defaults of those not given included, and what they start from."""
    flags = dict(vars(resolved(v)[0]))
    if not (v.base or low_rank(v)):  # these mean nothing without a rank
        del flags["rank_multiple"], flags["horizon_from"]
    comparable = [(name, tuple(value) if isinstance(value, list) else value) for name, value in flags.items()]
    return (v.script, *sorted(comparable), *(identity(v.base) if v.base else ()))


def resolved(v: Variant) -> tuple[Namespace, GPTConfig, dict]:
    """(flags, model, plan) as the script would have them. InputError names the point and says what the script would say."""
    try:
        if v.base:
            own = to_argv({**known(v.flags, v), "model-tag": v.base.label or "base", "run-tag": v.label})
            return resolve_adapted(v.script, own, to_argv(v.base.flags), v.processes)
        return resolve(to_argv(v.flags), v.processes)
    except InputError as e:
        raise InputError(f"point {v.label or '(all)'}: {e}") from None


@cache
def resolve(argv: tuple[str, ...], processes: int) -> tuple[Namespace, GPTConfig, dict]:
    args = flags_of("base_train", argv)
    if args.vocab_size < 1:
        raise InputError(
            f"--vocab-size {args.vocab_size}: give the number of tokens of the vocabulary, at least 258"
        )
    config = solve_budget(args, args.vocab_size)
    return args, config, training_plan(args, config, processes)


@cache
def resolve_adapted(
    script: str, argv: tuple[str, ...], base: tuple[str, ...], processes: int
) -> tuple[Namespace, GPTConfig, dict]:
    """Of a run that starts from the run of the flags `base`: its own flags, that model under its layer map, its own horizon."""
    args = flags_of(script, argv)
    (theirs, config, _) = resolve(base, processes)
    if args.layer_map:  # layers of a second run cost what those of the first do
        config = replace(
            config,
            layer_map=tuple(layer % config.n_layer for layer in parse_map(args.layer_map, config.n_layer)),
        )
    return args, config, training_plan(Namespace(**{**vars(theirs), **vars(args)}), config, processes)


def low_rank(v: Variant) -> bool:
    config = resolved(v)[1]
    return any(
        map(any, (config.attn_ranks, config.mlp_ranks, (config.lm_head_rank,), *config.matrix_ranks.values()))
    )
