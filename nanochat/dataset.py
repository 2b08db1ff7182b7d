"""The sources of text: Python's standard library, a folder of the user's files, or a downloaded public set.

Download:  python -m nanochat.dataset --data climbmix -n 8 -w 4
"""

import argparse
import functools
import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nanochat.arguments import ArgumentParser, whole_number
from nanochat.common import get_base_dir, locked, run_script
from nanochat.download_index import DownloadIndex
from nanochat.downloads import complete_folder
from nanochat.errors import InputError
from nanochat.files import create_folder
from nanochat.fingerprints import file_hash, short_hash
from nanochat.hub import HUB_SETS
from nanochat.readers import read_documents, text_format
from nanochat.splits import TEST, left_out_words, shortened, sort_folder


@dataclass(frozen=True)
class Shard:
    """A part of the text that is tokenised and cached as one unit."""

    name: str
    paths: tuple[Path, ...]  # one file of many documents, or many files of one document each

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the content. File names and times do not count.

        Downloaded sets have up to hundreds of GB, so of a large compressed file only the size and evenly
        spaced blocks are hashed, the first and the last one included. A change of the text nearly always
        changes the last block: in parquet it holds the offset, length and statistics of every column chunk,
        in gzip the checksum of all text.
        """
        return short_hash(file_hash(path) for path in self.paths)

    def read(self) -> Iterator[tuple[str, str]]:
        """(place in words, text) of each document in order, empty ones included.

        InputError: see readers.read_documents.
        """
        for path in self.paths:
            yield from read_documents(path)

    def documents(self) -> Iterator[str]:
        """The non-empty documents, in order."""
        return (text for _, text in self.read() if text)


@dataclass(frozen=True)
class AnnouncedShard(Shard):
    """A shard that process 0 of a run has listed and hashed. Another process reads it only to tokenise it."""

    fingerprint: str = ""

    def read(self) -> Iterator[tuple[str, str]]:
        """Shard.read. InputError also if this process has other text than process 0."""
        fingerprint = Shard(self.name, self.paths).fingerprint
        if fingerprint != self.fingerprint:
            raise InputError(
                f"{self.paths[0]}: other text than process 0 has (fingerprint {fingerprint}, "
                f"there {self.fingerprint}); give all processes the same files"
            )
        yield from super().read()


@dataclass(frozen=True)
class Corpus:
    """Training and validation text.

    folder: the one with its files. left_out: reason -> names of the files there that are in neither split.
    note: how the validation text was chosen, if no file name tells it.
    """

    name: str
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]
    folder: Path
    left_out: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""
    path: str = ""  # the user's folder, absolute; '' for a built-in text

    @property
    def place(self) -> str:
        """What to give to `--data` in any working directory."""
        return self.path or self.name

    def split(self, name: str) -> tuple[Shard, ...]:
        return {"train": self.train, "val": self.val}[name]

    def documents(self, split: str) -> Iterator[str]:
        for shard in self.split(split):
            yield from shard.documents()

    def fingerprint(self, split: str) -> str:
        """A short hash of the content of the split, shards in order."""
        return short_hash(shard.fingerprint for shard in self.split(split))

    def files(self, split: str) -> list[str]:
        """The paths of the split's files, relative to the folder."""
        return [os.path.relpath(path, self.folder) for shard in self.split(split) for path in shard.paths]

    def record(self) -> dict:
        """The files of each split, for a run's config.json: all names, or the first ones and the last."""
        record: dict[str, dict] = {
            "left_out": {reason: shortened(names, 100) for reason, names in self.left_out.items()}
        }
        for split in ("train", "val"):
            names = self.files(split)
            record[split] = {"count": len(names), "files": shortened(names, 100)}
        return record

    def announced(self) -> "Corpus":
        """This corpus, which process 0 has listed and hashed, for another process."""
        folder = self.folder if self.path else set_folder(self.name)
        splits: dict[str, Any] = {}
        for split in ("train", "val"):
            splits[split] = tuple(announced_shard(shard, self.folder, folder) for shard in self.split(split))
        return replace(self, folder=folder, **splits)

    def line(self) -> str:
        """The files of each split in one line, for people."""
        train = self.files("train")
        val = self.files("val")
        training = f"{len(train):,} training files ({train[0]} … {train[-1]})"
        if len(train) == 1:
            training = f"1 training file ({train[0]})"
        line = f"text: {self.folder}: {training}, validation: {', '.join(shortened(val, 3))}{self.note}"
        return line + (f", left out: {left_out_words(self.left_out)}" if self.left_out else "")


def announced_shard(shard: Shard, first_folder: Path, own_folder: Path) -> AnnouncedShard:
    """The folder of a built-in text may differ between process 0's machine and this one."""
    paths = tuple(own_folder / path.relative_to(first_folder) for path in shard.paths)
    return AnnouncedShard(shard.name, paths, shard.fingerprint)


def set_folder(name: str) -> Path:
    """The folder of a built-in text on this machine."""
    return Path(sysconfig.get_path("stdlib")) if name == "stdlib" else get_base_dir() / "data" / name


def open_corpus(data: str) -> Corpus:
    """The corpus that `--data` names: `stdlib`, a downloaded set, or a folder of files that readers.py reads.

    A built-in name wins over a folder of that name; `./stdlib` is the folder. InputError: an unknown name, a
    folder without enough files, a set that is not downloaded or lacks its validation file.
    """
    if data == "stdlib":
        return open_stdlib()
    if data in HUB_SETS:
        return open_downloaded(data)
    folder = Path(data).expanduser()
    if not data or not folder.exists():
        raise InputError(
            f"--data {data or repr(data)}: neither a folder nor one of stdlib, {', '.join(HUB_SETS)}"
        )
    if not folder.is_dir():
        raise InputError(f"--data {data}: a file; give the folder it is in")
    return open_folder(folder)


# ---- Python's standard library -----------------------------------------------------------------------------


def open_stdlib() -> Corpus:
    root = set_folder("stdlib")
    names = sorted(path.relative_to(root).as_posix() for path in python_sources(root))
    if not names:
        raise InputError(f"--data stdlib: no Python source below {root}; give a folder of text instead")
    val = tuple(root / name for name in names if is_val(name))
    train = tuple(root / name for name in names if not is_val(name))
    return Corpus("stdlib", (Shard("train", train),), (Shard("val", val),), root)


def python_sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if is_library_folder(Path(folder, name))]
        for name in files:
            path = Path(folder, name)
            if path.suffix == ".py" and path.is_file():
                yield path


def is_library_folder(folder: Path) -> bool:
    """Whether a folder belongs to the standard library itself, and not to packages installed beside it."""
    if folder.name in ("site-packages", "dist-packages", "__pycache__") or folder.name.startswith("."):
        return False
    return not (folder / "pyvenv.cfg").exists()


def is_val(name: str) -> bool:
    """Whether the file of this relative path is validation text.

    This holds for about one file in 20, and does not depend on which other files there are.
    """
    return hashlib.sha256(os.fsencode(name)).digest()[0] < 13  # of 256


# ---- a folder of the user's --------------------------------------------------------------------------------


def open_folder(folder: Path) -> Corpus:
    text = sort_folder(folder)
    note = ""
    if not text.val:
        text.val = [text.train.pop()]
        note = " (the last file)"
    if not text.train:
        problem = f"only {text.val[0].relative_to(folder).as_posix()}"
        if tests := text.left_out.get(TEST):
            names = ", ".join(shortened(tests))
            problem += f", beside {names} ({TEST}, left out: call it val to validate on it)"
        raise InputError(
            f"--data {folder}: {problem}; it takes text to train on and text to validate on, "
            "in two files or more"
        )
    path = os.path.abspath(folder)
    train = make_shards(text.train)
    val = make_shards(text.val)
    return Corpus(Path(path).name, train, val, folder, text.left_out, note, path)


def make_shards(files: list[Path]) -> tuple[Shard, ...]:
    """One shard for each file, and one for all .txt files: 100,000 of them must not make as many caches."""
    texts = tuple(f for f in files if text_format(f) == ".txt")
    shards = [Shard(f.name, (f,)) for f in files if text_format(f) != ".txt"]
    if texts:
        shards.append(Shard("txt", texts))
    return tuple(shards)


# ---- downloaded sets ---------------------------------------------------------------------------------------


def open_downloaded(name: str) -> Corpus:
    folder = set_folder(name)
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    hub_set = HUB_SETS[name]
    val, *train = map(hub_set.local_name, hub_set.files(hub_set.train_files))
    train = [file for file in train if file in present]
    remedy = f"run: python -m nanochat.dataset --data {name}"
    if not train or val not in present:
        problem = f"the validation file {val} is missing" if train else "no training file is downloaded"
        raise InputError(f"--data {name}: {problem}; {remedy}")
    index = DownloadIndex(folder)
    for file in (val, *train):
        if fault := index.fault(folder / file):
            raise InputError(f"--data {name}: {folder / file} {fault}; to fetch it again {remedy}")
    train_shards = make_shards([folder / file for file in train])
    return Corpus(name, train_shards, make_shards([folder / val]), folder)


def parse(argv=None):
    parser = ArgumentParser(
        "Download a public corpus: its validation file first, then training files. "
        "Files that exist are compared with the hub's list, and downloaded again if they differ. "
        "HF_ENDPOINT names another host, HF_TOKEN a login."
    )
    parser.add_argument("--data", choices=HUB_SETS, required=True, help="which one")
    parser.add_argument(
        "-n",
        type=whole_number(0, off=-1),
        default=argparse.SUPPRESS,
        metavar="N",
        help="training files to have, -1 = all (default: 8, or all if there are fewer; "
        "with --verify the files that exist)",
    )
    parser.add_argument("-w", type=whole_number(1), default=4, metavar="N", help="parallel downloads")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all files and their token caches, and compare them with their checksums",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    hub_set = HUB_SETS[args.data]
    count = getattr(args, "n", min(8, hub_set.train_files))
    if count > hub_set.train_files:
        raise InputError(
            f"-n {count}: {args.data} has {hub_set.train_files} training files; -1 fetches all of them"
        )
    folder = set_folder(args.data)
    create_folder(folder)
    with locked(folder / ".lock"):  # a second process waits here, and then finds the files
        # path on this machine -> start of the file's path on the hub
        every = {folder / hub_set.local_name(f): f for f in hub_set.files(hub_set.train_files)}
        names = set(os.listdir(folder))
        present = {path: f for path, f in every.items() if path.name in names}
        requested = set(hub_set.files(hub_set.train_files if count == -1 else count))
        if args.verify and "n" not in args.given:
            requested = {hub_set.val_file}
        missing = {path: f for path, f in every.items() if f in requested and path not in present}
        if args.verify and not present:
            raise InputError(
                f"--verify: nothing is downloaded; run: python -m nanochat.dataset --data {args.data}"
            )
        failures = complete_folder(hub_set, folder, present, missing, args.w, args.verify)
    for path, reason in sorted(failures.items()):
        print(f"missing {path.name}: {reason}", file=sys.stderr)
    if failures:
        total = len(present | missing)
        raise InputError(
            f"--data {args.data}: {len(failures)} of {total} files missing; "
            "the others are kept, run the same command again to fetch the rest"
        )
    train_files = sum(f != hub_set.val_file for f in (present | missing).values())
    print(f"{args.data}: {train_files} training files and the validation file are in {folder}")
    if args.verify:
        verify_token_caches(list(present | missing))


def verify_token_caches(paths: list[Path]):
    from nanochat.token_cache import remove_damaged  # here: downloading does not need numpy

    count, removed = remove_damaged(make_shards(paths))
    result = "all as they were built"
    if removed:
        result = f"{removed} removed: they are built again when needed"
    print(f"token caches of these files: {count} read, {result}")


if __name__ == "__main__":
    run_script(main)
