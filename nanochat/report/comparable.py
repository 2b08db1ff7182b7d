"""Which runs may be compared in what: look-ups in a run's record, and the check that quantities are like for like."""

from nanochat.metrics import Run
from nanochat.report.configurations import finished

# What has to be the same in two runs before a quantity of one may be divided by the other's. See check_comparable.
SAME_TEXT = "text"
SAME_TOKENIZER = "tokenizer"
SAME_MACHINE = "machine"
BOTH_FINISHED = "end"


def config_value(run: Run, path: str):
    """A value of config.json by its dotted path; None where any part of it is missing."""
    value = run.config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def summary_number(run: Run, key: str):
    """A number of summary.json (it may be NaN), or None."""
    value = run.summary.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def check_comparable(runs: list[Run]) -> tuple[dict, list[str], list[str]]:
    """({condition: names of the runs that differ from the first in it}, warnings, notes)."""
    first = runs[0]

    def differing(*paths):
        """Names of the runs that differ from the first in any of the paths, or where the first path is not recorded."""
        ours = [config_value(first, p) for p in paths]
        return [
            run.name for run in runs[1:] if ours[0] is None or [config_value(run, p) for p in paths] != ours
        ]

    broken = {
        SAME_TOKENIZER: differing("derived.tokenizer_hash"),
        SAME_TEXT: differing("derived.corpus.val_fingerprint"),
        SAME_MACHINE: differing(
            "device.type", "device.name", "device.dtype", "device.processes", "device.threads"
        ),
        BOTH_FINISHED: [run.name for run in runs if not (finished(run) and finished(first))],
    }
    # Under one tokenizer, another number of validation tokens is another text. (Two tokenizers always count differently.)
    broken[SAME_TEXT] += [
        name
        for name in differing("derived.val_tokens")
        if name not in broken[SAME_TEXT] + broken[SAME_TOKENIZER]
    ]
    warnings = []
    notes = []

    if broken[SAME_TOKENIZER]:
        warnings.append(
            f"{join_names(broken[SAME_TOKENIZER])} did not, on record, use the tokenizer of {first.name}, so perplexity is "
            "not comparable and no ratio of it is shown; bits per byte is comparable across tokenizers only on the "
            "same validation text."
        )
    if broken[SAME_TEXT]:
        warnings.append(
            f"{join_names(broken[SAME_TEXT])} did not, on record, use the validation text of {first.name} (another "
            "corpus, or another part of it), so neither perplexity nor bits per byte is comparable and no ratio of "
            "them is shown; bits per byte is comparable across tokenizers only on the same validation text."
        )
    if broken[SAME_MACHINE]:
        warnings.append(
            f"{join_names(broken[SAME_MACHINE])} did not, on record, run on the device of {first.name}, with its dtype, "
            "processes and threads, so times and memory are not comparable and no ratio of them is shown."
        )
    for run in runs:
        if not finished(run):
            notes.append(
                f"{run.name} is unfinished: its values are those at {progress(run)}, and no ratio of final values "
                "is shown."
            )
    for what, path in (
        ("training text", "derived.corpus.train_fingerprint"),
        ("number of training tokens", "derived.tokens"),
        ("total batch size", "derived.total_batch_size"),
        ("sequence length", "derived.model.sequence_len"),
        ("per-device batch size (it moves memory and tokens/s)", "flags.device_batch_size"),
        ("seed", "seed"),
        ("code (git commit)", "git.commit"),
    ):
        if config_value(first, path) is not None and (others := differing(path)):
            notes.append(f"Different {what} from {first.name}: {join_names(others)}.")
    dirty = [run.name for run in runs if config_value(run, "git.dirty")]
    if dirty:
        notes.append(f"Ran from a source tree with uncommitted changes: {join_names(dirty)}.")
    settings = [sorted((k, str(v)) for k, v in flags(run).items() if k != "seed") for run in runs]
    if len(runs) > 1 and all(settings.count(s) == 1 for s in settings):
        notes.append(
            "One seed a configuration: without repeated seeds a difference between runs has no error bar."
        )
    return broken, warnings, notes


def join_names(some: list[str]) -> str:
    return ", ".join(some) if len(some) <= 6 else ", ".join(some[:5]) + f" and {len(some) - 5} more"


def progress(run: Run) -> str:
    total = config_value(run, "derived.num_iterations")
    return f"step {run.summary.get('step', 0)}" + (f" of {total}" if total else "")


def status_words(run: Run) -> str:
    """ "finished", "unfinished (step 40 of 200)" or "diverged (…)", and how many steps were not applied."""
    words = "finished"
    if not finished(run):
        words = f"{'diverged' if diverged(run) else 'unfinished'} ({progress(run)})"
    return words + (f", {unapplied(run):,} steps not applied" if unapplied(run) else "")


def diverged(run: Run) -> bool:
    """Whether the run ended because too many steps in a row could not be applied."""
    return run.summary.get("status") == "diverged"


def unapplied(run: Run) -> int:
    """Steps that left the weights as they were, because the loss or the gradient was not finite."""
    count = summary_number(run, "train/bad_steps")
    return int(count) if count and 0 < count < 1e18 else 0


def divergence_notes(runs: list[Run]) -> list[str]:
    """A note on each run that diverged, or of which some steps were not applied."""
    notes = []
    for run in runs:
        parts = []
        if unapplied(run):
            steps = f"{unapplied(run):,} of {summary_number(run, 'step') or 0:,} steps"
            parts.append(f"{steps} not applied: loss or gradient not finite")
        if diverged(run):
            parts.append("it ended by --max-bad-steps, before its last step")
        if parts:
            notes.append(f"{run.name}: {'; '.join(parts)}.")
    return notes


def flags(run: Run) -> dict:
    """The flags that shape a run; its names on disk and on wandb, and whether it was resumed, do not."""
    return {
        k: v for k, v in (config_value(run, "flags") or {}).items() if k not in ("model_tag", "run", "resume")
    }
