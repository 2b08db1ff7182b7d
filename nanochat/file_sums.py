"""What is known of the files of a downloaded set: `.index.json` beside them has the size and the sum of each.

A sum is `sha256:…`, or for files that the hub keeps in git itself `git-sha1:…`, as git names a content.
Reading hundreds of GB at every call would take hours. So a file that was compared once is known again by its
stamp (its size, times and number). It is read if that has changed since, and by --verify.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from nanochat.common import InputError
from nanochat.files import Schema, digest_file, read_json, write_json
from nanochat.fingerprints import stamp_of

INDEX = ".index.json"
SCHEMA = Schema("index of downloaded files", {"files": dict})
RECORD = Schema("record of a downloaded file", {"size": int, "sum": str, "stamp": str})
BAD = ""  # the stamp of a file that differs from its sum


def sum_of(path: Path, like: str) -> str:
    """The sum of a file's content, of the kind that the sum `like` is."""
    kind = like.partition(":")[0]
    digest = hashlib.sha256()
    if kind == "git-sha1":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    return f"{kind}:{digest_file(path, digest).hexdigest()}"


class FileSums:
    """The index of one folder."""

    def __init__(self, folder: Path):
        self.path = folder / INDEX
        self.files = {}  # name -> {"size", "sum", "stamp"}
        content = {"files": {}}
        with contextlib.suppress(InputError, FileNotFoundError):  # a damaged one is made again from the files
            content = read_json(self.path, SCHEMA)
        for name, record in content["files"].items():
            with contextlib.suppress(InputError):
                self.files[name] = RECORD.check(name, record)

    def save(self):
        write_json(self.path, {"files": dict(sorted(self.files.items()))})

    def fault(self, path: Path) -> str:
        """What is wrong with a file as far as a look from outside tells, in words; '' if nothing is."""
        state = os.stat(path)
        record = self.files.get(path.name)
        if record is None:  # of an earlier version of this program
            return "" if looks_whole(path, state.st_size) else f"is damaged ({state.st_size:,} bytes)"
        if state.st_size != record["size"]:
            return f"has {state.st_size:,} bytes instead of {record['size']:,}"
        return "differs from the hub's" if record["stamp"] == BAD else ""

    def compare(self, path: Path, size: int, sum: str, read: bool) -> str:
        """What is wrong with a file of which the size and the sum ('': unknown) are given; '' if nothing is.

        read: the file is read even if it is as it was when last compared.
        """
        record = self.files.get(path.name, {})
        stamp = BAD
        fault = ""
        try:
            state = os.stat(path)
            stamp = stamp_of(state)
            if state.st_size != size:
                fault = f"has {state.st_size:,} bytes instead of {size:,}"
            elif record == {"size": size, "sum": sum, "stamp": stamp} and not read:
                return ""
            elif sum and sum_of(path, sum) != sum:
                fault = "has another sum"
        except OSError as e:
            fault = f"cannot be read ({e.strerror})"
        outdated = record.get("stamp") == stamp != BAD and (record["size"], record["sum"]) != (size, sum)
        if not (fault and outdated):  # an older file of the hub's is used until the new one is here
            self.files[path.name] = {"size": size, "sum": sum, "stamp": BAD if fault else stamp}
        return fault

    def add(self, path: Path, size: int, sum: str):
        """Record a file that was compared before it was put there."""
        self.files[path.name] = {"size": size, "sum": sum, "stamp": stamp_of(os.stat(path))}


def looks_whole(path: Path, size: int) -> bool:
    """Whether a file begins and ends as a parquet or gzip file does: lost writes leave nothing, or zeros."""
    if size < 12:
        return False
    with open(path, "rb") as f:
        head = f.read(4)
        f.seek(-8, os.SEEK_END)
        tail = f.read(8)
    if path.name.endswith(".parquet"):
        return head == tail[4:] == b"PAR1"
    return head[:2] == b"\x1f\x8b" and any(tail)
