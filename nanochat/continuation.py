"""Whether a run is the one of a record, and what a run that goes on inherits from its record.

A record is the config.json of a run. An earlier version of this program may have written it: with fewer flags
and with other defaults.
"""

import contextlib
import json
import operator
from argparse import Namespace
from operator import itemgetter
from pathlib import Path

from nanochat.common import differing_entries
from nanochat.errors import InputError
from nanochat.flag_types import Role
from nanochat.flags import FLAGS, OLD_DEFAULTS, flag_names
from nanochat.metrics import runs_dir
from nanochat.processes import print0
from nanochat.run_files import read_config

# What may change when a run is resumed: it changes neither the model nor its text. grad_accum_steps is
# derived from the device's batch size.
FREE = {*(flag.name for flag in FLAGS if flag.free), "grad_accum_steps"}
# Flags that say where something is. What is there is compared, by its fingerprint or hash.
PLACES = set(flag_names(Role.PLACE))
# Flags that name the run. Its folder may be copied under another name.
NAMES = set(flag_names(Role.NAME))


def read_record(folder: Path) -> dict:
    """config.json of a run folder; {} where there is none."""
    return read_config(folder) if (folder / "config.json").is_file() else {}


def flags_given(record: dict) -> set[str]:
    """Names of the flags that the user gave. Earlier versions did not record them: there all count."""
    return set(record.get("given", record.get("flags", {})))


def inheritance(args, record: dict) -> dict:
    """{flag: value} that a run keeps from its record: nobody gave them, and their default has changed since.

    args: the flags of this start, with `given`.
    """
    if not record:
        return {}
    recorded = {**OLD_DEFAULTS, **record.get("flags", {})}
    fixed = flags_given(record) | args.given | FREE | PLACES
    return {
        name: recorded[name]
        for name, value in vars(args).items()
        if name in recorded and name not in fixed and recorded[name] != value
    }


def inherit(args, record: dict, tag: str):
    """Change args to what the run of this tag keeps from its record, and say so."""
    values = inheritance(args, record)
    args.take(values, runs_dir() / tag / "config.json")
    if values:
        print0(f"{tag}: as it began, with {flags_text(values)}")


def flags_text(values: dict) -> str:
    """{'mlp_ratio': 4.0} -> '--mlp-ratio 4.0'"""
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def tag_by_default(args, make_tag) -> str:
    """make_tag(flags), or the tag that an earlier version made of this command, if that began a run."""
    tag = make_tag(args)
    names = vars(args).keys() & (OLD_DEFAULTS.keys() - args.given)
    old_defaults = {name: OLD_DEFAULTS[name] for name in names}
    if read_record(runs_dir() / tag) or old_defaults.items() <= vars(args).items():
        return tag
    with contextlib.suppress(InputError):  # the flags may not fit together under the old defaults
        earlier = make_tag(Namespace(**vars(args) | old_defaults))
        record = read_record(runs_dir() / earlier)
        if record and make_tag(Namespace(**vars(args) | inheritance(args, record))) == earlier:
            return earlier
    return tag


def deciding(flags: dict) -> dict:
    """The flags that decide what a run computes, as a checkpoint's meta.json keeps them."""
    left_out = FREE | PLACES | NAMES
    return json.loads(json.dumps({name: value for name, value in flags.items() if name not in left_out}))


# ---- the same run or another -------------------------------------------------------------------------------


def differences(record: dict, flags: dict, derived: dict) -> list[str]:
    """Names of what differs between a record and the run of these flags and derived values, with both values.

    A flag that the record lacks counts as its old default. The tag is the folder's name and does not
    count. Text counts by its fingerprints, wherever it is. A derived value that one of the two lacks does not
    count: either it came later, or a flag differs too.
    """
    flags, derived = json.loads(json.dumps([flags, derived]))
    recorded_derived = record.get("derived", {})
    recorded = {name: OLD_DEFAULTS[name] for name in flags.keys() & OLD_DEFAULTS}
    recorded |= record.get("flags", {})
    ignore = {"run_tag" if "run_tag" in flags else "model_tag", *PLACES}
    text = text_fingerprints(derived)
    if not text or text_fingerprints(recorded_derived) != text:
        ignore.remove("data")  # the user who has to choose wants to know where the other text is
    recorded = {name: value for name, value in recorded.items() if name not in ignore}
    flags = {name: value for name, value in flags.items() if name not in ignore}
    recorded_derived, derived = common_values(recorded_derived, derived)
    return differing_keys(recorded, flags, "flags.") + differing_keys(recorded_derived, derived, "derived.")


def differing_keys(recorded: dict, current: dict, prefix: str = "") -> list[str]:
    """'prefix.key (1 there, 2 now)' of each entry of nested dicts that differs, those in FREE left out."""
    entries = sorted(differing_entries(recorded, current, operator.eq), key=itemgetter(0))
    return [
        f"{prefix}{'.'.join(names)} ({a!r} there, {b!r} now)"
        for names, a, b in entries
        if names[-1] not in FREE
    ]


def text_fingerprints(derived: dict) -> dict:
    corpus = derived.get("corpus", {})
    return {name: value for name, value in corpus.items() if name.endswith("_fingerprint")}


def common_values(recorded: dict, current: dict) -> tuple[dict, dict]:
    """Both sets of derived values without the keys, and the keys inside them, that only one has.

    Of the entry of the text the fingerprints stay.
    """
    recorded = {**recorded, "corpus": text_fingerprints(recorded)}
    recorded, current = common_keys(recorded, {**current, "corpus": text_fingerprints(current)})
    for key in recorded:
        if isinstance(recorded[key], dict) and isinstance(current[key], dict):
            recorded[key], current[key] = common_keys(recorded[key], current[key])
    return recorded, current


def common_keys(a: dict, b: dict) -> tuple[dict, dict]:
    return {key: a[key] for key in a if key in b}, {key: b[key] for key in b if key in a}
