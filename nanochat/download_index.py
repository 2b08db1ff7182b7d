"""The index of a downloaded set: `.index.json` beside the files holds the size and the checksum of each.

A checksum is `sha256:…`, or `git-sha1:…` (git's hash of a blob) for files that the hub keeps in git itself.
Reading hundreds of GB at every call would take hours. So a file is read and compared once, and its stamp
(size, times and inode number) is recorded. It is read again if the stamp has changed, and with --verify.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from nanochat.errors import InputError
from nanochat.files import Schema, digest_file, read_json, write_json
from nanochat.fingerprints import file_stamp

INDEX = ".index.json"
INDEX_SCHEMA = Schema("index of downloaded files", {"files": dict})
FILE_RECORD = Schema("record of a downloaded file", {"size": int, "sum": str, "stamp": str})
BAD = ""  # the stamp of a file that differs from its checksum


def same_kind_checksum(path: Path, example: str) -> str:
    """The checksum of a file's content, of the same kind as the example."""
    kind = example.partition(":")[0]
    digest = hashlib.sha256()
    if kind == "git-sha1":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    return f"{kind}:{digest_file(path, digest).hexdigest()}"


class DownloadIndex:
    """The index of one folder."""

    def __init__(self, folder: Path):
        self.path = folder / INDEX
        self.files = {}  # name -> {"size", "sum", "stamp"}
        content = {"files": {}}
        with contextlib.suppress(InputError, FileNotFoundError):  # a damaged index is made again
            content = read_json(self.path, INDEX_SCHEMA)
        for name, record in content["files"].items():
            with contextlib.suppress(InputError):
                self.files[name] = FILE_RECORD.check(name, record)

    def save(self):
        write_json(self.path, {"files": dict(sorted(self.files.items()))})

    def fault(self, path: Path) -> str:
        """What is wrong with a file, as far as its size and the index tell, in words; '' if nothing."""
        state = os.stat(path)
        record = self.files.get(path.name)
        if record is None:  # an earlier version of this program downloaded it
            return "" if looks_whole(path, state.st_size) else f"is damaged ({state.st_size:,} bytes)"
        if state.st_size != record["size"]:
            return f"has {state.st_size:,} bytes instead of {record['size']:,}"
        return "differs from the hub's" if record["stamp"] == BAD else ""

    def compare(self, path: Path, size: int, checksum: str, read: bool) -> str:
        """Compare a file with its size and checksum ('': unknown). Returns what is wrong; '' if nothing.

        read: read the file even if its stamp has not changed since the last comparison.
        """
        record = self.files.get(path.name, {})
        stamp = BAD
        fault = ""
        try:
            state = os.stat(path)
            stamp = file_stamp(state)
            if state.st_size != size:
                fault = f"has {state.st_size:,} bytes instead of {size:,}"
            elif record == {"size": size, "sum": checksum, "stamp": stamp} and not read:
                return ""
            elif checksum and same_kind_checksum(path, checksum) != checksum:
                fault = "has another checksum"
        except OSError as e:
            fault = f"cannot be read ({e.strerror})"
        outdated = record.get("stamp") == stamp != BAD and (record["size"], record["sum"]) != (size, checksum)
        if not (fault and outdated):  # the hub has a new version: use the old file until the new one is here
            self.files[path.name] = {"size": size, "sum": checksum, "stamp": BAD if fault else stamp}
        return fault

    def add(self, path: Path, size: int, checksum: str):
        """Record a file that was compared before it was moved here."""
        self.files[path.name] = {"size": size, "sum": checksum, "stamp": file_stamp(os.stat(path))}


def looks_whole(path: Path, size: int) -> bool:
    """Whether a file begins and ends as a parquet or gzip file does. Lost writes leave it empty, or zeros."""
    if size < 12:
        return False
    with open(path, "rb") as f:
        head = f.read(4)
        f.seek(-8, os.SEEK_END)
        tail = f.read(8)
    if path.name.endswith(".parquet"):
        return head == tail[4:] == b"PAR1"
    return head[:2] == b"\x1f\x8b" and any(tail)
