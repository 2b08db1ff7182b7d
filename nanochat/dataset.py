"""Where text comes from: the embedded corpus, a folder of the user's files, or a downloaded public set.

Download:  python -m nanochat.dataset --data climbmix -n 8 -w 4
"""
import argparse
import contextlib
import functools
import gzip
import hashlib
import json
import os
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import ArgumentParser, InputError, first_line, get_base_dir, locked, run_script, sha256, whole_number
from nanochat.hub import HUB_SETS, download

MAX_DOCUMENT_CHARS = 64 * 2**20  # tokenising takes several times this much memory, in every worker
SUFFIXES = (".parquet", ".jsonl", ".txt")
VAL_NAMES = ("val", "validation")

# A compressed file larger than all its samples together is fingerprinted by samples.
COMPRESSED = (".parquet", ".gz")
SAMPLES, SAMPLE_BYTES = 64, 2**20


@dataclass(frozen=True)
class Shard:
    """A unit of text that is tokenised and cached by itself."""
    name: str
    paths: tuple[Path, ...]  # one file of many documents, or many files of one document each

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the content, read once; file names and times do not count.

        Large compressed files (downloaded sets go to hundreds of GB) are not read whole at every start: their size and
        evenly spaced blocks are hashed, from the first to the last one. Other text nearly always means another last one:
        it has the offset, length and statistics of every column chunk of a parquet, and the checksum of all text in a gzip.
        """
        return _short_hash(_sampled_sha256(path) if path.suffix.lower() in COMPRESSED
                           and path.stat().st_size > SAMPLES * SAMPLE_BYTES else sha256(path) for path in self.paths)

    def documents(self) -> Iterator[str]:
        """The non-empty documents, in order.

        InputError: a file that is not what its suffix says, a parquet without a string column `text`, a JSON line
        that is no object with a string `text`, invalid UTF-8, a document longer than MAX_DOCUMENT_CHARS.
        """
        for path in self.paths:
            for where, text in _READERS[path.suffix.lower()](path):
                if len(text) > MAX_DOCUMENT_CHARS:
                    raise _too_long(where)
                if text:
                    yield text


@dataclass(frozen=True)
class Corpus:
    """Training and validation text."""
    name: str
    train: tuple[Shard, ...]
    val: tuple[Shard, ...]

    def split(self, name: str) -> tuple[Shard, ...]:
        return {"train": self.train, "val": self.val}[name]

    def documents(self, split: str) -> Iterator[str]:
        for shard in self.split(split):
            yield from shard.documents()

    def fingerprint(self, split: str) -> str:
        """A short hash of the content of the split, shards in order."""
        return _short_hash(shard.fingerprint for shard in self.split(split))


def open_corpus(data: str) -> Corpus:
    """The corpus that `--data` names: `stdlib`, a downloaded set, or a folder of parquet, jsonl or txt files.

    A built-in name wins over a folder of that name; `./stdlib` is the folder.
    InputError: an unknown name, a folder without enough files, a set that is not downloaded or lacks its validation.
    """
    if data == "stdlib":
        return _open_stdlib()
    if data in HUB_SETS:
        return _open_downloaded(data)
    folder = Path(data).expanduser()
    if not data or not folder.exists():
        raise InputError(f"--data {data or repr(data)}: neither a folder nor one of stdlib, {', '.join(HUB_SETS)}")
    if not folder.is_dir():
        raise InputError(f"--data {data}: a file; give the folder it is in")
    return _open_folder(folder)


# ---- reading --------------------------------------------------------------------------------------------------------
# A reader yields (where, text) for each document of a file.

def _read_parquet(path: Path):
    import pyarrow as pa  # here, because the embedded corpus needs none of it
    import pyarrow.parquet as pq

    with open(path, "rb") as f:
        try:
            parquet = pq.ParquetFile(f)
            columns = {field.name: field.type for field in parquet.schema_arrow}
            if columns.get("text") not in (pa.string(), pa.large_string()):
                found = ", ".join(f"{name}: {kind}" for name, kind in columns.items())
                raise InputError(f"{path}: no string column 'text' (it has {found or 'no columns'})")
            row = 0
            for batch in parquet.iter_batches(batch_size=64, columns=["text"]):  # few rows: they may be long
                for value in batch.column(0).cast(pa.large_binary()):  # as bytes: pyarrow does not check UTF-8
                    row += 1
                    where = f"{path}: row {row}"
                    yield where, _decode(value.as_py() or b"", where)
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"{path}: not a readable parquet file ({first_line(e)})")


def _read_jsonl(path: Path, opened=open):
    with opened(path, "rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(_max_bytes() + 1), b""), 1):
            if not line.isspace():
                where = f"{path}: line {number}"
                yield where, _text_field(_decode(line, where), where)


def _read_json_gz(path: Path):
    try:
        yield from _read_jsonl(path, gzip.open)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(f"{path}: not a readable gzip file ({first_line(e)})")


def _text_field(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode("utf-8")  # JSON can escape half of a surrogate pair, which is no character
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{where}: not a JSON object with a string 'text'")
    return text


def _read_text(path: Path):
    if path.stat().st_size > _max_bytes():
        raise _too_long(path)
    yield path, _decode(path.read_bytes(), path)


def _read_source(path: Path):
    """As _read_text, but CPython's few files in other encodings (tests of its codecs) are no documents."""
    with contextlib.suppress(InputError):
        yield from _read_text(path)


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".gz": _read_json_gz, ".txt": _read_text, ".py": _read_source}


def _decode(data: bytes, where) -> str:
    if len(data) > _max_bytes():
        raise _too_long(where)
    try:
        return data.decode("utf-8").removeprefix("\ufeff")  # a byte order mark is no text
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: invalid UTF-8 at byte {e.start}; convert the file to UTF-8")


def _max_bytes() -> int:
    return 4 * MAX_DOCUMENT_CHARS  # a character takes at most 4


def _too_long(where) -> InputError:
    return InputError(f"{where}: a document of more than {MAX_DOCUMENT_CHARS:,} characters; split it")


# ---- fingerprints ---------------------------------------------------------------------------------------------------

def _sampled_sha256(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as f:
        for i in range(SAMPLES):
            f.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _short_hash(parts) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


# ---- the embedded corpus --------------------------------------------------------------------------------------------

def _open_stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in _sources(root))
    if not names:
        raise InputError(f"--data stdlib: no Python source below {root}; give a folder of text instead")
    val = tuple(root / name for name in names if _is_val(name))
    train = tuple(root / name for name in names if not _is_val(name))
    return Corpus("stdlib", (Shard("train", train),), (Shard("val", val),))


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [s for s in subfolders
                         if s not in ("site-packages", "dist-packages", "__pycache__")
                         and not s.startswith(".") and not Path(folder, s, "pyvenv.cfg").exists()]
        yield from (path for name in files if (path := Path(folder, name)).suffix == ".py" and path.is_file())


def _is_val(name: str) -> bool:
    """Whether the file of this relative path is validation: about one in 20, whatever other files there are."""
    return hashlib.sha256(os.fsencode(name)).digest()[0] < 13  # of 256


# ---- a folder of the user's -----------------------------------------------------------------------------------------

def _open_folder(folder: Path) -> Corpus:
    files = _text_files(folder)
    train = [f for f in files if f.stem not in VAL_NAMES]
    val = [f for f in files if f.stem in VAL_NAMES]
    for name in VAL_NAMES:
        if (folder / name).is_dir():
            val += _text_files(folder / name)
    if not val:
        val = [train.pop()]
    if not train:
        raise InputError(f"--data {folder}: only {val[0].name}; it takes text to train on and text to validate on, "
                         f"in two files or more")
    return Corpus(Path(os.path.abspath(folder)).name, _shards(train), _shards(val))


def _text_files(folder: Path) -> list[Path]:
    try:
        files = sorted(f for f in folder.iterdir()
                       if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file())
    except OSError as e:
        raise InputError(f"--data {folder}: {e.strerror}")
    if not files:
        raise InputError(f"--data {folder}: no {', '.join(SUFFIXES)} file directly in this folder")
    return files


def _shards(files: list[Path]) -> tuple[Shard, ...]:
    """A shard a file, but one for all txt files together: a folder of 100,000 is no reason for as many caches."""
    texts = tuple(f for f in files if f.suffix.lower() == ".txt")
    shards = [Shard(f.name, (f,)) for f in files if f.suffix.lower() != ".txt"]
    return tuple(shards + ([Shard("txt", texts)] if texts else []))


# ---- downloaded sets ------------------------------------------------------------------------------------------------

def _open_downloaded(name: str) -> Corpus:
    folder = get_base_dir() / "data" / name
    present = set(os.listdir(folder)) if folder.is_dir() else set()
    hub_set = HUB_SETS[name]
    val, *train = map(hub_set.local_name, hub_set.files(hub_set.train_files))
    train = [file for file in train if file in present]
    if not train or val not in present:
        problem = f"the validation file {val} is missing" if train else "no training file is downloaded"
        raise InputError(f"--data {name}: {problem}; run: python -m nanochat.dataset --data {name}")
    return Corpus(name, _shards([folder / file for file in train]), _shards([folder / val]))


def main(argv=None):
    parser = ArgumentParser("Download a public corpus: its validation file first, then training files. "
                            "HF_ENDPOINT names another host, HF_TOKEN a login.")
    parser.add_argument("--data", choices=HUB_SETS, required=True, help="which one")
    parser.add_argument("-n", type=whole_number(-1), default=argparse.SUPPRESS, metavar="N",
                        help="training files to have, -1 = all (default: 8, or all if there are fewer)")
    parser.add_argument("-w", type=whole_number(1), default=4, metavar="N", help="parallel downloads")
    args = parser.parse_args(argv)
    hub_set = HUB_SETS[args.data]
    count = getattr(args, "n", min(8, hub_set.train_files))
    if count > hub_set.train_files:
        raise InputError(f"-n {count}: {args.data} has {hub_set.train_files} training files; -1 fetches all of them")
    files = hub_set.files(hub_set.train_files if count == -1 else count)

    folder = get_base_dir() / "data" / args.data
    targets = {f: folder / hub_set.local_name(f) for f in files}
    with locked(folder / ".lock"):  # a second process waits, and then finds the files
        missing = {f: path for f, path in targets.items() if not path.exists()}
        failures = download(hub_set, missing, folder / ".incoming", args.w) if missing else {}
    for path, reason in sorted(failures.items()):
        print(f"missing {path.name}: {reason}", file=sys.stderr)
    if failures:
        raise InputError(f"--data {args.data}: {len(failures)} of {len(targets)} files missing; "
                         "the others are kept, run the same command again to fetch the rest")
    print(f"{args.data}: {len(targets) - 1} training files and the validation file are in {folder}")


if __name__ == "__main__":
    run_script(main)
