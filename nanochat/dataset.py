"""Where text comes from: the embedded corpus, a folder of the user's files, or a downloaded public set.

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

from nanochat.common import ArgumentParser, InputError, get_base_dir, locked, run_script, whole_number
from nanochat.downloads import complete
from nanochat.file_sums import FileSums
from nanochat.files import create_folder
from nanochat.fingerprints import file_hash, short_hash
from nanochat.hub import HUB_SETS
from nanochat.readers import read_documents, text_format
from nanochat.splits import TEST, in_words, shortened, sort_folder


@dataclass(frozen=True)
class Shard:
    """A unit of text that is tokenised and cached by itself."""

    name: str
    paths: tuple[Path, ...]  # one file of many documents, or many files of one document each

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the content, read once; file names and times do not count.

        Large compressed files (downloaded sets go to hundreds of GB) are not read whole: their size and
        evenly spaced blocks are hashed, from the first to the last one. Other text nearly always means
        another last one: it has the offset, length and statistics of every column chunk of a parquet, and
        the checksum of all text in a gzip.
        """
        return short_hash(file_hash(path) for path in self.paths)

    def located(self) -> Iterator[tuple[str, str]]:
        """(place in words, text) of each document, in order, empty ones included.

        InputError: see readers.read_documents.
        """
        for path in self.paths:
            yield from read_documents(path)

    def documents(self) -> Iterator[str]:
        """The non-empty documents, in order."""
        return (text for _, text in self.located() if text)


@dataclass(frozen=True)
class AnnouncedShard(Shard):
    """A shard that process 0 of a run has listed and hashed. This process reads it only to tokenise it."""

    fingerprint: str = ""

    def located(self) -> Iterator[tuple[str, str]]:
        """As of any shard. InputError too where this process has other text than process 0."""
        fingerprint = Shard(self.name, self.paths).fingerprint
        if fingerprint != self.fingerprint:
            raise InputError(
                f"{self.paths[0]}: other text than process 0 has (fingerprint {fingerprint}, "
                f"there {self.fingerprint}); give all processes the same files"
            )
        yield from super().located()


@dataclass(frozen=True)
class Corpus:
    """Training and validation text.

    folder: where its files are. left_out: reason -> names of files there that are in neither split.
    note: how the validation text was chosen, where it has no name of its own.
    """

    name: str
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]
    folder: Path
    left_out: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""
    path: str = ""  # of the user's folder, absolute

    @property
    def place(self) -> str:
        """What `--data` calls it from anywhere."""
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
        """Their names, within the folder."""
        return [os.path.relpath(path, self.folder) for shard in self.split(split) for path in shard.paths]

    def record(self) -> dict:
        """Which files are which, for a run's config.json; of many the first and the last."""
        record: dict[str, dict] = {
            "left_out": {reason: shortened(names, 100) for reason, names in self.left_out.items()}
        }
        for split in ("train", "val"):
            names = self.files(split)
            record[split] = {"count": len(names), "files": shortened(names, 100)}
        return record

    def announced(self) -> "Corpus":
        """This corpus, listed and hashed by process 0, for another process."""
        folder = self.folder if self.path else set_folder(self.name)
        splits: dict[str, Any] = {}
        for split in ("train", "val"):
            splits[split] = tuple(announced_shard(shard, self.folder, folder) for shard in self.split(split))
        return replace(self, folder=folder, **splits)

    def line(self) -> str:
        """The same for people, in one line."""
        train = self.files("train")
        val = self.files("val")
        training = f"{len(train):,} training files ({train[0]} … {train[-1]})"
        if len(train) == 1:
            training = f"1 training file ({train[0]})"
        line = f"text: {self.folder}: {training}, validation: {', '.join(shortened(val, 3))}{self.note}"
        return line + (f", left out: {in_words(self.left_out)}" if self.left_out else "")


def announced_shard(shard: Shard, folder_there: Path, folder_here: Path) -> AnnouncedShard:
    """The folder of a built-in text may be elsewhere on another machine."""
    paths = tuple(folder_here / path.relative_to(folder_there) for path in shard.paths)
    return AnnouncedShard(shard.name, paths, shard.fingerprint)


def set_folder(name: str) -> Path:
    """Where the text of a built-in name is on this machine."""
    return Path(sysconfig.get_path("stdlib")) if name == "stdlib" else get_base_dir() / "data" / name


def open_corpus(data: str) -> Corpus:
    """The corpus that `--data` names: `stdlib`, a downloaded set, or a folder of files that readers.py reads.

    A built-in name wins over a folder of that name; `./stdlib` is the folder.
    InputError: an unknown name, a folder without enough files, a set that is not downloaded or lacks its validation.
    """
    if data == "stdlib":
        return _open_stdlib()
    if data in HUB_SETS:
        return _open_downloaded(data)
    folder = Path(data).expanduser()
    if not data or not folder.exists():
        raise InputError(
            f"--data {data or repr(data)}: neither a folder nor one of stdlib, {', '.join(HUB_SETS)}"
        )
    if not folder.is_dir():
        raise InputError(f"--data {data}: a file; give the folder it is in")
    return _open_folder(folder)


# ---- the embedded corpus --------------------------------------------------------------------------------------------


def _open_stdlib() -> Corpus:
    root = set_folder("stdlib")
    names = sorted(path.relative_to(root).as_posix() for path in _sources(root))
    if not names:
        raise InputError(f"--data stdlib: no Python source below {root}; give a folder of text instead")
    val = tuple(root / name for name in names if _is_val(name))
    train = tuple(root / name for name in names if not _is_val(name))
    return Corpus("stdlib", (Shard("train", train),), (Shard("val", val),), root)


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            s
            for s in subfolders
            if s not in ("site-packages", "dist-packages", "__pycache__")
            and not s.startswith(".")
            and not Path(folder, s, "pyvenv.cfg").exists()
        ]
        yield from (path for name in files if (path := Path(folder, name)).suffix == ".py" and path.is_file())


def _is_val(name: str) -> bool:
    """Whether the file of this relative path is validation: about one in 20, whatever other files there are."""
    return hashlib.sha256(os.fsencode(name)).digest()[0] < 13  # of 256


# ---- a folder of the user's -----------------------------------------------------------------------------------------


def _open_folder(folder: Path) -> Corpus:
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
    return Corpus(Path(path).name, _shards(text.train), _shards(text.val), folder, text.left_out, note, path)


def _shards(files: list[Path]) -> tuple[Shard, ...]:
    """A shard a file, but one for all txt files together: a folder of 100,000 is no reason for as many caches."""
    texts = tuple(f for f in files if text_format(f) == ".txt")
    shards = [Shard(f.name, (f,)) for f in files if text_format(f) != ".txt"]
    return tuple(shards + ([Shard("txt", texts)] if texts else []))


# ---- downloaded sets ------------------------------------------------------------------------------------------------


def _open_downloaded(name: str) -> Corpus:
    folder = set_folder(name)
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    hub_set = HUB_SETS[name]
    val, *train = map(hub_set.local_name, hub_set.files(hub_set.train_files))
    train = [file for file in train if file in present]
    remedy = f"run: python -m nanochat.dataset --data {name}"
    if not train or val not in present:
        problem = f"the validation file {val} is missing" if train else "no training file is downloaded"
        raise InputError(f"--data {name}: {problem}; {remedy}")
    sums = FileSums(folder)
    for file in (val, *train):
        if fault := sums.fault(folder / file):
            raise InputError(f"--data {name}: {folder / file} {fault}; to fetch it again {remedy}")
    return Corpus(name, _shards([folder / file for file in train]), _shards([folder / val]), folder)


def parse(argv=None):
    parser = ArgumentParser(
        "Download a public corpus: its validation file first, then training files. "
        "Files that are there already are compared with what the hub lists, and fetched "
        "again if they differ. HF_ENDPOINT names another host, HF_TOKEN a login."
    )
    parser.add_argument("--data", choices=HUB_SETS, required=True, help="which one")
    parser.add_argument(
        "-n",
        type=whole_number(0, off=-1),
        default=argparse.SUPPRESS,
        metavar="N",
        help="training files to have, -1 = all (default: 8, or all if there are fewer; with "
        "--verify those that are there)",
    )
    parser.add_argument("-w", type=whole_number(1), default=4, metavar="N", help="parallel downloads")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all files whole, and their token caches, and compare them with their sums",
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
    with locked(folder / ".lock"):  # a second process waits, and then finds the files
        every = {folder / hub_set.local_name(f): f for f in hub_set.files(hub_set.train_files)}
        names = set(os.listdir(folder))
        present = {path: f for path, f in every.items() if path.name in names}
        wanted = set(hub_set.files(hub_set.train_files if count == -1 else count))
        if args.verify and "n" not in args.given:
            wanted = {hub_set.val_file}
        missing = {path: f for path, f in every.items() if f in wanted and path not in present}
        if args.verify and not present:
            raise InputError(
                f"--verify: nothing is downloaded; run: python -m nanochat.dataset --data {args.data}"
            )
        failures = complete(hub_set, folder, present, missing, args.w, args.verify)
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
    from nanochat.token_cache import remove_damaged  # here: numpy, which downloading does not need

    count, removed = remove_damaged(_shards(paths))
    kept = "all as they were built" if not removed else f"{removed} removed: they are built again when needed"
    print(f"token caches of these files: {count} read, {kept}")


if __name__ == "__main__":
    run_script(main)
