"""A trial: one combination of an experiment's flags, for several seeds.

The scripts' own parsers and planners turn its flags into a model and a training plan.
"""

from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import cache

from nanochat.budget import choose_model
from nanochat.errors import InputError
from nanochat.gpt import GPTConfig
from nanochat.layer_maps import parse_map
from nanochat.naming import option
from nanochat.plan import training_plan
from nanochat.sweep.schema import flag_names, parse_script_flags


@dataclass
class Trial:
    """A point of the file at one combination of its values; under each of its seeds it is one run."""

    table: dict  # [points.NAME] of the file; {} of a partner that the file does not name
    label: str  # the point's name and the values that vary: "scan_lr0.02"
    flags: dict  # flag -> value, as in the file
    seeds: list[int]
    processes: int
    own_flags: set[str] = field(default_factory=set)  # set by the point or the grid, not by [flags]
    paired_with: str = ""  # the point of its full-rank partner; "": the partner is made from the flags
    partner: "Trial | None" = None
    script: str = "base_train"
    base: "Trial | None" = None  # the trial whose finished run it starts from

    def add_seeds(self, seeds: list[int]):
        self.seeds += [seed for seed in seeds if seed not in self.seeds]


def to_argv(flags: dict) -> tuple[str, ...]:
    """Flags as words of a command line. A switch that is true stands alone; one that is false is left out."""
    words = []
    for flag, value in flags.items():
        if value is True:
            words.append(f"--{flag}")
        elif value is not False:
            words += option(f"--{flag}", str(value))
    return tuple(words)


def flags_for_script(flags: dict, trial: Trial) -> dict:
    """The flags that the trial's script has. Those of the point's own table stay: the script checks them."""
    names = flag_names(trial.script)
    return {flag: value for flag, value in flags.items() if flag in names or flag in trial.table}


def identity(trial: Trial) -> tuple:
    """A key that is equal for trials that are the same run: all flags with their defaults, and the base."""
    flags = dict(vars(resolve_trial(trial)[0]))
    if not (trial.base or is_low_rank(trial)):  # without a rank these have no effect
        del flags["rank_multiple"], flags["horizon_from"]
    hashable = [(name, tuple(value) if isinstance(value, list) else value) for name, value in flags.items()]
    base = identity(trial.base) if trial.base else ()
    return (trial.script, *sorted(hashable), *base)


def is_low_rank(trial: Trial) -> bool:
    config = resolve_trial(trial)[1]
    ranks = [config.attn_ranks, config.mlp_ranks, (config.lm_head_rank,), *config.matrix_ranks.values()]
    return any(map(any, ranks))


def resolve_trial(trial: Trial) -> tuple[Namespace, GPTConfig, dict]:
    """(flags, model, training plan) of the trial's script.

    InputError: the name of the point, then the script's own message.
    """
    try:
        if not trial.base:
            return resolve(to_argv(trial.flags), trial.processes)
        tags = {"model-tag": trial.base.label or "base", "run-tag": trial.label}
        argv = to_argv({**flags_for_script(trial.flags, trial), **tags})
        return resolve_adapted(trial.script, argv, to_argv(trial.base.flags), trial.processes)
    except InputError as e:
        raise InputError(f"point {trial.label or '(all)'}: {e}") from None


@cache
def resolve(argv: tuple[str, ...], processes: int) -> tuple[Namespace, GPTConfig, dict]:
    """(flags, model, training plan) of a run of base_train."""
    args = parse_script_flags("base_train", argv)
    if args.vocab_size < 1:
        raise InputError(
            f"--vocab-size {args.vocab_size}: give the number of tokens of the vocabulary, at least 258"
        )
    config = choose_model(args, args.vocab_size)
    return args, config, training_plan(args, config, processes)


@cache
def resolve_adapted(
    script: str, argv: tuple[str, ...], base_argv: tuple[str, ...], processes: int
) -> tuple[Namespace, GPTConfig, dict]:
    """(flags, model, training plan) of a run that starts from the run of `base_argv`.

    The model is the base's with this run's layer map. If both runs have a flag, this run's value counts.
    """
    args = parse_script_flags(script, argv)
    base_args, config, _ = resolve(base_argv, processes)
    if args.layer_map:
        # a map may also name layers of a second checkpoint; they cost as much as those of the first
        layer_map = tuple(layer % config.n_layer for layer in parse_map(args.layer_map, config.n_layer))
        config = replace(config, layer_map=layer_map)
    all_args = Namespace(**{**vars(base_args), **vars(args)})
    return args, config, training_plan(all_args, config, processes)
