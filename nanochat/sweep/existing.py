"""Runs of a sweep that exist already: flags that they pass on, and whether they belong to the sweep."""

from dataclasses import replace

from nanochat import metrics
from nanochat.continuation import differences, flags_given, inheritance, read_record
from nanochat.errors import InputError
from nanochat.sweep.experiment import Point, Sweep
from nanochat.sweep.trial import to_argv


def inherited_flags(sweep: Sweep) -> dict:
    """{flag: value} that runs of this sweep inherit from their records, because a default has changed.

    The other runs get these values too, so that all runs can be compared. A flag counts if no two runs
    inherit different values of it.
    """
    pretraining = [point for point in sweep.points if not point.base]
    inherited = [inheritance(point.args, read_record(point.folder)) for point in pretraining]
    values = {}
    for run in inherited:
        values |= {name: value for name, value in run.items() if isinstance(value, (int, float, str))}
    agreed = {}
    for name, value in values.items():
        if all(run.get(name) in (None, value) for run in inherited):
            agreed[name] = value
    return agreed


def without_inherited(point: Point, values: dict) -> Point:
    """The point without the flags that its run inherits: on a command line they would count as given."""
    record = read_record(point.folder)
    if not record:
        return point
    argv = list(point.argv)
    for name in values.keys() - flags_given(record):
        words = to_argv({name.replace("_", "-"): values[name]})
        if words and words[0] in argv and getattr(point.args, name) == values[name]:
            start = argv.index(words[0])
            del argv[start : start + len(words)]
    return replace(point, argv=tuple(argv))


def check_existing(sweep: Sweep, tokenizer, corpora: dict):
    """InputError if a run with a name of this sweep is another run: of an earlier file, or on another text.

    corpora: {text: its opened corpus}
    """
    differing = {}
    for point in sweep.points:
        if point.status() != "new":
            names = differing_names(point, tokenizer, corpora[point.args.data])
            if names:
                differing[point.tag] = names
    if not differing:
        return
    tag, names = next(iter(differing.items()))
    more = f" (and {len(differing) - 1} more such runs)" if len(differing) > 1 else ""
    raise InputError(
        f"{tag}: {metrics.runs_dir() / tag} is another run: {'; '.join(names)}{more}"
        "; rename the experiment file, or move these runs away"
    )


def differing_names(point: Point, tokenizer, corpus) -> list[str]:
    """What differs between the record of a run and the point: see continuation.differences."""
    record = metrics.load_run(point.folder).config
    fingerprints = {f"{split}_fingerprint": corpus.fingerprint(split) for split in ("train", "val")}
    derived = {"tokenizer_hash": tokenizer.hash, "corpus": fingerprints}
    flags = vars(point.args) | inheritance(point.args, record)
    if point.base:  # its run took the model's shape and the checkpoint's step from its base
        recorded = record.get("flags", {})
        flags = recorded | flags | {"step": recorded.get("step")}
    names = differences(record, flags, derived)
    return [name.removeprefix("flags.").removeprefix("derived.") for name in names]
