"""From the points of an experiment file to its trials: every combination of values, with full-rank partners.

`spec` is the file's content as `schema.check_spec` returns it.
"""

import itertools

from nanochat.accounting import count_parameters
from nanochat.errors import InputError
from nanochat.flags import FLAGS
from nanochat.model_flags import RANK_GROUP
from nanochat.naming import part_of_tag
from nanochat.sweep.schema import check_whole_numbers, without_point_keys
from nanochat.sweep.trial import Trial, identity, is_low_rank, resolve_trial

# flags of a low-rank run that its full-rank partner does not have
RANK_FLAGS = (*(flag.option[2:] for flag in RANK_GROUP.flags), "recompute")
# flag -> its short form in labels; other flags are written out
SHORT_NAMES = {flag.option[2:]: flag.short for flag in FLAGS if flag.short is not None}


def make_trials(spec: dict, texts: dict[str, str]) -> tuple[list[Trial], list[tuple[str, str]]]:
    """(trials, duplicates) of a file; trials that others start from are first. duplicates: see `merge_equal`.

    texts: {name of a point's text: where it is}; the other runs read the text of [flags].
    """
    trials = [trial for name in spec["points"] for trial in expand_point(name, spec)]
    for trial in trials:
        resolve_budget(trial, spec)
        if trial.script != "base_train":
            where = f"point {trial.label}: base"
            trial.base = find_trial(where, trial.table["base"], trial, trials, spec)
            main = spec["flags"]["data"]
            trial.flags["data"] = texts.get(trial.flags["data"], main) if "data" in trial.table else main
    add_partners(trials, spec)
    trials, duplicates = merge_equal(trials)
    return sorted(trials, key=lambda trial: trial.base is not None), duplicates


def expand_point(name: str, spec: dict) -> list[Trial]:
    """A trial at every combination of the point's lists and of the grid, without the flags that it sets."""
    table = spec["points"][name]
    point_flags = without_point_keys(table)
    lists = {flag: value for flag, value in point_flags.items() if isinstance(value, list)}
    axes = lists | {flag: values for flag, values in spec["grid"].items() if flag not in point_flags}
    seeds = check_whole_numbers(f"[points.{name}]: seeds", table.get("seeds", spec["seeds"]), 0)
    if not seeds:
        where = f"[points.{name}]: " if name else ""
        raise InputError(f"{where}no seeds: write for example seeds = [1, 2]")
    trials = []
    for values in itertools.product(*axes.values()):
        varied = dict(zip(axes, values))
        words = [name, *(label_word(flag, value) for flag, value in varied.items())]
        trial = Trial(
            table=table,
            label="_".join(filter(None, words)),
            flags={**spec["flags"], **point_flags, **varied},
            seeds=list(seeds),
            processes=spec["processes"],
            own_flags={*point_flags, *axes},
            paired_with=table.get("paired-with", ""),
            script=table.get("script", "base_train"),
        )
        trials.append(trial)
    return trials


def label_word(flag: str, value) -> str:
    """A flag and its value in a label: lr0.02, attn64, d8."""
    if isinstance(value, bool):
        return flag if value else f"no-{flag}"
    return f"{SHORT_NAMES.get(flag, flag)}{part_of_tag(str(value))}"


# ---- references to other trials ----------------------------------------------------------------------------


def grid_values(trial: Trial, spec: dict) -> dict:
    """{flag: the trial's value} of the flags in [grid]."""
    return {flag: trial.flags[flag] for flag in spec["grid"]}


def trial_at(where: str, name: str, values: dict, spec: dict) -> Trial:
    """The trial of the point `name` at these values of the grid. InputError if there is none, or several.

    where: the reference, for the error: "point low: paired-with".
    """
    if name not in spec["points"]:
        choices = ", ".join(filter(None, spec["points"])) or "none with names"
        raise InputError(f"{where} {name!r}: no point of this file; there are {choices}")
    grid = {flag: [value] for flag, value in values.items()}
    trials = expand_point(name, {**spec, "grid": grid})
    if len(trials) > 1:
        labels = ", ".join(trial.label for trial in trials[:3])
        raise InputError(
            f"{where} {name!r}: that is {len(trials)} points, {labels}, …; "
            "name one with a single value of each flag"
        )
    return trials[0]


def find_trial(where: str, name: str, trial: Trial, trials: list[Trial], spec: dict) -> Trial:
    """The one of `trials` that `trial` names as its base, a run of base_train.

    name: its label, or the name of its point; of that point it is the trial at the grid's values of `trial`.
    """
    base = trial_with_label(name, trials)
    if not base:
        values = {flag: v for flag, v in grid_values(trial, spec).items() if flag not in trial.table}
        label = trial_at(where, name, values, spec).label
        base = trial_with_label(label, trials)
        if not base:
            raise InputError(
                f"{where} {name!r}: there is no run {label}; this point sets a flag of [grid] itself, "
                "so name one run with its values"
            )
    if base.script != "base_train":
        raise InputError(
            f"{where} {name!r}: is a run of {base.script} itself; name a point that starts from scratch"
        )
    return base


def trial_with_label(label: str, trials: list[Trial]) -> Trial | None:
    return next((trial for trial in trials if trial.label == label), None)


def resolve_budget(trial: Trial, spec: dict):
    """Replace a budget that names a point by that point's parameters, so that no run waits for another."""
    name = str(trial.flags.get("budget-params", ""))
    if not name or name.replace("_", "").isdigit():
        return
    where = f"point {trial.label}: budget-params"
    other = trial_at(where, name, grid_values(trial, spec), spec)
    if other.flags.get("budget-params"):
        raise InputError(
            f"{where} {name!r}: that point has a budget itself; name the point that it refers to"
        )
    trial.flags["budget-params"] = count_parameters(resolve_trial(other)[1])


# ---- partners ----------------------------------------------------------------------------------------------


def add_partners(trials: list[Trial], spec: dict):
    """Give every low-rank trial its full-rank partner, under all its seeds.

    A partner that is not in the list is inserted there, before the first trial that needs it.
    """
    trial_by_identity = {identity(trial): trial for trial in reversed(trials)}
    for trial in list(trials):
        partner = full_rank_partner(trial, trials, spec)
        if partner is None:
            continue
        key = identity(partner)
        if key not in trial_by_identity:
            trial_by_identity[key] = partner
            trials.insert(trials.index(trial), partner)
        trial.partner = trial_by_identity[key]
        trial.partner.add_seeds(trial.seeds)


def full_rank_partner(trial: Trial, trials: list[Trial], spec: dict) -> Trial | None:
    """A new trial, without seeds: the point that `trial` names, or `trial` without its flags of ranks."""
    if trial.paired_with:
        where = f"point {trial.label}: paired-with"
        partner = trial_at(where, trial.paired_with, grid_values(trial, spec), spec)
        resolve_budget(partner, spec)
        partner.seeds = []
        return partner
    if not spec.get("baseline", True) or trial.base or not is_low_rank(trial):
        return None
    flags = {flag: value for flag, value in trial.flags.items() if flag not in RANK_FLAGS}
    own_flags = [flag for flag in flags if flag in trial.own_flags]
    words = [label_word(flag, flags[flag]) for flag in own_flags]
    label = "_".join(["full", *words])
    if trial_with_label(label, trials):  # perhaps another run: the two must not share a name
        label = "_".join(["full-rank", *words])
    return Trial({}, label, flags, [], trial.processes, set(own_flags))


def merge_equal(trials: list[Trial]) -> tuple[list[Trial], list[tuple[str, str]]]:
    """Merge trials that are the same run, as where two scans cross, into one with all their seeds.

    Returns (trials, [(label of a removed trial, label of the one that stays)]).
    """
    first = {}
    duplicates = []
    for trial in trials:
        original = first.setdefault(identity(trial), trial)
        if original is not trial:
            duplicates.append((trial.label, original.label))
            original.add_seeds(trial.seeds)
            original.partner = original.partner or trial.partner
    for trial in first.values():
        trial.partner = trial.partner and first[identity(trial.partner)]
        trial.base = trial.base and first[identity(trial.base)]
    return list(first.values()), duplicates
