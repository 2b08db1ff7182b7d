"""Hashes of text files. Two texts are the same if their content is, whatever their names and folders.

The hash of a large file is kept in $NANOCHAT_BASE_DIR/fingerprints, together with the file's size, times and
inode number. Hashing thousands of shards again would take many minutes at every start, in every process.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from nanochat.common import get_base_dir
from nanochat.files import open_file, sha256, sync_file, write_atomic

# Of a compressed file larger than SAMPLES * SAMPLE_BYTES only samples are hashed.
COMPRESSED = (".parquet", ".gz", ".zst")
SAMPLES = 64
SAMPLE_BYTES = 2**20

RECORDED_FROM = 2**22  # bytes: the hash of a smaller file is computed each time
SETTLED_AFTER = 2.0  # seconds: a second change soon after the first may leave the same time


def file_hash(path: Path) -> str:
    """The hash of a file in hexadecimal: of all of its content, or of samples of a large compressed file."""
    state = os.stat(path)
    if state.st_size < RECORDED_FROM:
        return content_hash(path)
    stamp = f"{file_stamp(state)} {SAMPLES} {SAMPLE_BYTES}"
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    record = get_base_dir() / "fingerprints" / name
    with contextlib.suppress(OSError, ValueError), open_file(record) as f:
        if digest := recorded_hash(f.read(1000).decode(), stamp):
            return digest
    digest = content_hash(path)
    if time.time() - state.st_ctime > SETTLED_AFTER:
        with contextlib.suppress(OSError):  # if it cannot be written, it is computed again next time
            sync_file(path)  # else a power cut could leave the file its size and times, without content
            line = f"{stamp} {digest}"
            write_atomic(record, f"{line}\n{short_hash([line])}\n")
    return digest


def file_stamp(state: os.stat_result) -> str:
    """A text that differs after any change to the file. No program can set back st_ctime."""
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def recorded_hash(text: str, stamp: str) -> str:
    """The hash in the text of a record; '' if it is of another state of the file, or damaged.

    Line 1 is the stamp and the hash; line 2 is a checksum of line 1. Earlier versions wrote no line 2.
    """
    line, *checksum = text.splitlines() or [""]
    recorded_stamp, _, digest = line.rpartition(" ")
    is_valid = len(digest) == 64 and checksum in ([], [short_hash([line])])
    return digest if is_valid and recorded_stamp == stamp else ""


def content_hash(path: Path) -> str:
    if path.suffix.lower() in COMPRESSED and path.stat().st_size > SAMPLES * SAMPLE_BYTES:
        return sampled_sha256(path)
    return sha256(path)


def sampled_sha256(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as f:
        for i in range(SAMPLES):
            f.seek(i * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()


def short_hash(parts) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
