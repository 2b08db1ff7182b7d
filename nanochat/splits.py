"""Sorting the files of a folder into training text, validation text, and files that are left out.

A file's name tells its split if its first or last word is one of SPLIT_WORDS. Words are separated by - _ .
and spaces. Upper case, numbers, "of" and long hexadecimal numbers are ignored. These names tell a split:
train-00000-of-00004.parquet, my_corpus.val.jsonl, Test.txt, data_train2.txt. These do not: contest.jsonl,
development.jsonl.

A .txt file is one document. Its whole name must be such a word, unless some name in the folder tells training
text: the-test.txt among stories is a story; wiki.test.txt beside wiki.train.txt is a test split. A subfolder
tells the split by its whole name: train/, dev/, test/.

Test splits are never used. Files whose names tell nothing are training text. If there is no validation text,
the last training file becomes it.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.errors import InputError
from nanochat.readers import FORMAT_NAMES, holds_no_text, stem, text_format

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "test": "test",
}
NO_FILE = "no .parquet, .jsonl, .txt file (or .json, .gz, .zst) directly in this folder"
TEST = "a test split"
NO_TEXT = "no text"
UNREAD = f"not read: give {FORMAT_NAMES}"
SUBFOLDER = "a folder that is not read: give it as --data"
DESCRIPTIONS = re.compile(
    r"(readme|licen[cs]e|notice|changelog|citation|checksums?|(sha|md5)\d*sums?|_success)(\..*)?"
    r"|.*\.(json|md|sha\d*|md5|crc|lock|py|sh|png|jpe?g|svg)(\.gz|\.zst)?",
    re.IGNORECASE,
)
NO_WORDS = re.compile(r"\d+|of|[0-9a-f]{12,}|")


@dataclass
class FolderText:
    """The files of a folder, in order. left_out: reason -> names."""

    train: list[Path] = field(default_factory=list)
    val: list[Path] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str):
        self.left_out.setdefault(reason, []).append(name)


def find_split(name: str, single_word: bool) -> str | None:
    """'train', 'val' or 'test'; None if the name tells nothing. single_word: it must have no other.

    If a name tells two splits (dev-test, train_test), the safer one counts: test before val before train.
    """
    words = [word for word in re.split(r"[-_.\s]+", name.lower()) if not NO_WORDS.fullmatch(word)]
    if not words or (single_word and len(words) > 1):
        return None
    splits = {SPLIT_WORDS.get(word.rstrip("0123456789")) for word in (words[0], words[-1])}
    return next((split for split in ("test", "val", "train") if split in splits), None)


def sort_folder(folder: Path) -> FolderText:
    """The text of a folder and of its subfolders named after splits. InputError if there is none."""
    text = FolderText()
    files, subfolders = readable_files(folder, folder, text)
    names_tell = any(find_split(stem(file), single_word=False) == "train" for file in files)
    for file in files:
        is_document = text_format(file) == ".txt" and not names_tell
        add_file(file, find_split(stem(file), is_document), text, folder)
    for subfolder in subfolders:
        add_subfolder(subfolder, find_split(subfolder.name, single_word=True), text, folder)
    if not (text.train or text.val):
        left_out = f"; left out: {left_out_words(text.left_out)}" if text.left_out else ""
        raise InputError(f"--data {folder}: {NO_FILE}{left_out}")
    return text


def readable_files(folder: Path, root: Path, text: FolderText) -> tuple[list[Path], list[Path]]:
    """(files to read, subfolders), sorted by name, without hidden ones. Other files are left out."""
    files = []
    subfolders = []
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as e:
        raise InputError(f"--data {folder}: {e.strerror}") from None
    for entry in entries:
        suffix = text_format(entry)
        if entry.is_dir():
            subfolders.append(entry)
        elif suffix and entry.is_file() and not (suffix == ".json" and holds_no_text(entry)):
            files.append(entry)
        else:
            reason = NO_TEXT if DESCRIPTIONS.fullmatch(entry.name) else UNREAD
            text.leave_out(entry.relative_to(root).as_posix(), reason)
    return files, subfolders


def add_subfolder(subfolder: Path, split: str | None, text: FolderText, root: Path):
    """Add the files of a subfolder to its split. split None: leave the subfolder out."""
    if not split:
        if any(text_format(Path(name)) for name in names_below(subfolder)):
            text.leave_out(f"{subfolder.relative_to(root).as_posix()}/", SUBFOLDER)
        return
    files, deeper = readable_files(subfolder, root, text)
    if not files and split == "val":
        raise InputError(f"--data {subfolder}: {NO_FILE}")
    for file in files:
        add_file(file, split, text, root)
    for folder in deeper:
        add_subfolder(folder, None, text, root)


def add_file(file: Path, split: str | None, text: FolderText, root: Path):
    if split == "test":
        text.leave_out(file.relative_to(root).as_posix(), TEST)
    elif split == "val":
        text.val.append(file)
    else:
        text.train.append(file)


def names_below(folder: Path, limit: int = 10_000) -> Iterator[str]:
    """Names of files in a folder and its subfolders, without hidden ones. Stops after about `limit` files."""
    for _, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (name for name in files if not name.startswith("."))
        limit -= len(files)
        if limit < 0:
            return


def left_out_words(left_out: dict[str, list[str]]) -> str:
    """'a.csv, b.csv (not read: …), test.jsonl (a test split)'"""
    return ", ".join(f"{', '.join(shortened(names))} ({reason})" for reason, names in left_out.items())


def shortened(names, limit: int = 6) -> list[str]:
    """At most `limit` names: the first ones, and the last."""
    names = list(names)
    if len(names) <= limit:
        return names
    return [*names[: limit - 1], f"… {len(names) - limit} more …", names[-1]]
