"""Whether runs may be compared: each quantity of two runs needs certain conditions to be the same in both.

The functions read a run's config.json and summary.json.
"""

from nanochat.metrics import Run
from nanochat.report.configurations import finished

# Conditions that two runs must share before a quantity of one is divided by that of the other.
SAME_TEXT = "text"
SAME_TOKENIZER = "tokenizer"
SAME_MACHINE = "machine"
BOTH_FINISHED = "end"

MACHINE_PATHS = ("device.type", "device.name", "device.dtype", "device.processes", "device.threads")
# (quantity, path in config.json): a difference forbids no ratio, but the reader should know it
NOTED_DIFFERENCES = (
    ("training text", "derived.corpus.train_fingerprint"),
    ("number of training tokens", "derived.tokens"),
    ("total batch size", "derived.total_batch_size"),
    ("sequence length", "derived.model.sequence_len"),
    ("per-device batch size (it moves memory and tokens/s)", "flags.device_batch_size"),
    ("seed", "seed"),
    ("code (git commit)", "git.commit"),
)


def config_value(run: Run, path: str):
    """A value of config.json by its dotted path; None if any part of the path is missing."""
    value = run.config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def summary_number(run: Run, key: str):
    """A number of summary.json, which may be NaN, or None."""
    value = run.summary.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# ---- the check ---------------------------------------------------------------------------------------------


def check_comparable(runs: list[Run]) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """({condition: names of the runs that do not share it with the first}, warnings, notes)."""
    broken = broken_conditions(runs)
    return broken, condition_warnings(runs[0], broken), difference_notes(runs)


def broken_conditions(runs: list[Run]) -> dict[str, list[str]]:
    first = runs[0]
    tokenizer = differing_runs(runs, "derived.tokenizer_hash")
    text = differing_runs(runs, "derived.corpus.val_fingerprint")
    # Under one tokenizer, another number of validation tokens is another text. Two tokenizers count
    # differently.
    recounted = differing_runs(runs, "derived.val_tokens")
    return {
        SAME_TOKENIZER: tokenizer,
        SAME_TEXT: text + [name for name in recounted if name not in text + tokenizer],
        SAME_MACHINE: differing_runs(runs, *MACHINE_PATHS),
        BOTH_FINISHED: [run.name for run in runs if not (finished(run) and finished(first))],
    }


def differing_runs(runs: list[Run], *paths: str) -> list[str]:
    """The runs that differ from the first in any of the paths; all of them if it lacks the first path."""
    expected = [config_value(runs[0], path) for path in paths]
    names = []
    for run in runs[1:]:
        values = [config_value(run, path) for path in paths]
        if expected[0] is None or values != expected:
            names.append(run.name)
    return names


def condition_warnings(first: Run, broken: dict[str, list[str]]) -> list[str]:
    warnings = []
    if names := broken[SAME_TOKENIZER]:
        warnings.append(
            f"{join_names(names)} did not, on record, use the tokenizer of {first.name}, so perplexity is "
            "not comparable and no ratio of it is shown; bits per byte is comparable across tokenizers only "
            "on the same validation text."
        )
    if names := broken[SAME_TEXT]:
        warnings.append(
            f"{join_names(names)} did not, on record, use the validation text of {first.name} (another "
            "corpus, or another part of it), so neither perplexity nor bits per byte is comparable and no "
            "ratio of them is shown; bits per byte is comparable across tokenizers only on the same "
            "validation text."
        )
    if names := broken[SAME_MACHINE]:
        warnings.append(
            f"{join_names(names)} did not, on record, run on the device of {first.name}, with its dtype, "
            "processes and threads, so times and memory are not comparable and no ratio of them is shown."
        )
    return warnings


def difference_notes(runs: list[Run]) -> list[str]:
    """What else a reader should know before comparing the runs."""
    first = runs[0]
    notes = []
    for run in runs:
        if not finished(run):
            values = f"its values are those at {progress(run)}, and no ratio of final values is shown"
            notes.append(f"{run.name} is unfinished: {values}.")
    for quantity, path in NOTED_DIFFERENCES:
        names = differing_runs(runs, path) if config_value(first, path) is not None else []
        if names:
            notes.append(f"Different {quantity} from {first.name}: {join_names(names)}.")
    dirty = [run.name for run in runs if config_value(run, "git.dirty")]
    if dirty:
        notes.append(f"Ran from a source tree with uncommitted changes: {join_names(dirty)}.")
    if len(runs) > 1 and not repeats_a_seed(runs):
        notes.append(
            "One seed a configuration: without repeated seeds a difference between runs has no error bar."
        )
    return notes


def repeats_a_seed(runs: list[Run]) -> bool:
    """Whether two runs have the same flags, the seed aside."""
    settings = []
    for run in runs:
        settings.append({flag: str(value) for flag, value in shaping_flags(run).items() if flag != "seed"})
    return any(settings.count(each) > 1 for each in settings)


def shaping_flags(run: Run) -> dict:
    """The flags without those that shape no run: its names on disk and on W&B, and whether it was resumed."""
    flags = config_value(run, "flags") or {}
    return {flag: value for flag, value in flags.items() if flag not in ("model_tag", "run", "resume")}


# ---- words -------------------------------------------------------------------------------------------------


def join_names(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


def progress(run: Run) -> str:
    step = f"step {run.summary.get('step', 0)}"
    total = config_value(run, "derived.num_iterations")
    return f"{step} of {total}" if total else step


def status_words(run: Run) -> str:
    """ "finished", "unfinished (step 40 of 200)" or "diverged (…)", and how many steps were not applied."""
    words = "finished"
    if not finished(run):
        words = f"{'diverged' if diverged(run) else 'unfinished'} ({progress(run)})"
    skipped = skipped_steps(run)
    return f"{words}, {skipped:,} steps not applied" if skipped else words


def diverged(run: Run) -> bool:
    """Whether the run ended because too many steps in a row could not be applied."""
    return run.summary.get("status") == "diverged"


def skipped_steps(run: Run) -> int:
    """Steps that left the weights as they were, because the loss or the gradient was not finite."""
    count = summary_number(run, "train/bad_steps")
    return int(count) if count and 0 < count < 1e18 else 0


def divergence_notes(runs: list[Run]) -> list[str]:
    """A note on each run that diverged or has steps that were not applied."""
    notes = []
    for run in runs:
        parts = []
        if skipped_steps(run):
            steps = f"{skipped_steps(run):,} of {summary_number(run, 'step') or 0:,} steps"
            parts.append(f"{steps} not applied: loss or gradient not finite")
        if diverged(run):
            parts.append("it ended by --max-bad-steps, before its last step")
        if parts:
            notes.append(f"{run.name}: {'; '.join(parts)}.")
    return notes
