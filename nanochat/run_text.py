"""Finding the text of a run again. Its folder may have been moved since, or its content changed."""

from pathlib import Path

from nanochat.dataset import HUB_SETS, Corpus, open_corpus
from nanochat.errors import InputError
from nanochat.metrics import Run


def open_run_text(run: Run, data: str = "") -> Corpus:
    """The text of --data. Without it, the text that is now in the folder of the run's text."""
    if data:
        return open_corpus(data)
    data_flag = run.config["flags"]["data"]
    place = run.config["derived"]["corpus"].get("path") or data_flag  # earlier versions recorded no path
    if not Path(place).is_dir() and Path(data_flag).expanduser().is_dir():
        place = data_flag
    if place not in ("stdlib", *HUB_SETS) and not Path(place).expanduser().is_dir():
        raise InputError(
            f"--data: needed, since the text of the run {run.name} is no longer in {place}; "
            "give the folder where it is"
        )
    return open_corpus(place)


def recorded_text(run: Run) -> dict[str, str]:
    """{split: fingerprint} of the text that the run was trained on"""
    corpus = run.config["derived"]["corpus"]
    return {split: corpus[f"{split}_fingerprint"] for split in ("train", "val")}


def fingerprints(corpus: Corpus) -> dict[str, str]:
    """{split: fingerprint} of a corpus"""
    return {split: corpus.fingerprint(split) for split in ("train", "val")}


def note_on_text(run: Run, corpus: Corpus) -> str:
    """A line that says that the corpus is not the text of the run; '' if it is."""
    recorded = recorded_text(run)
    present = fingerprints(corpus)
    words = {"train": "training", "val": "validation"}
    splits = [words[split] for split in words if present[split] != recorded[split]]
    if not splits:
        return ""
    text = f"the {' and '.join(splits)} text in {corpus.place}"
    return f"note: {text} is other text than that of the run {run.name}"
