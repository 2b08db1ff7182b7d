"""The text of a run, wherever it is now: its folder may have been moved, or hold other text than it did."""

from pathlib import Path

from nanochat.common import InputError
from nanochat.dataset import HUB_SETS, Corpus, open_corpus
from nanochat.metrics import Run


def open_run_text(run: Run, data: str = "") -> Corpus:
    """The text of --data or, without it, what is now where the run read its text: see `note_on_text`."""
    if data:
        return open_corpus(data)
    given = run.config["flags"]["data"]
    place = run.config["derived"]["corpus"].get("path") or given  # earlier versions did not record the path
    if not Path(place).is_dir() and Path(given).expanduser().is_dir():
        place = given
    if place not in ("stdlib", *HUB_SETS) and not Path(place).expanduser().is_dir():
        raise InputError(
            f"--data: needed, since the text of the run {run.name} is no longer in {place}; "
            "give the folder where it is"
        )
    return open_corpus(place)


def recorded_text(run: Run) -> dict[str, str]:
    """{split: fingerprint} of the text that the run was trained on."""
    corpus = run.config["derived"]["corpus"]
    return {split: corpus[f"{split}_fingerprint"] for split in ("train", "val")}


def fingerprints(corpus: Corpus) -> dict[str, str]:
    """{split: fingerprint}"""
    return {split: corpus.fingerprint(split) for split in ("train", "val")}


def note_on_text(run: Run, corpus: Corpus) -> str:
    """A line where the corpus is not the text that the run was trained on, else ''."""
    recorded = recorded_text(run)
    now = fingerprints(corpus)
    words = {"train": "training", "val": "validation"}
    splits = [words[split] for split in words if now[split] != recorded[split]]
    if not splits:
        return ""
    text = f"the {' and '.join(splits)} text in {corpus.place}"
    return f"note: {text} is other text than that of the run {run.name}"
