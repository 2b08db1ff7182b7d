"""Short hashes of text files: data is the same where its content is, wherever it lies, whatever it is called.

The hash of a large file is kept in $NANOCHAT_BASE_DIR/fingerprints with the file's size, times and number:
thousands of shards would take many minutes at every start, in every process.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from nanochat.common import get_base_dir
from nanochat.files import open_file, sha256, sync_file, write_atomic

# A compressed file larger than all its samples together is hashed by samples.
COMPRESSED = (".parquet", ".gz", ".zst")
SAMPLES = 64
SAMPLE_BYTES = 2**20

KEPT_FROM = 2**22  # bytes; smaller files are hashed in no time
SETTLED_AFTER = 2.0  # seconds since the last change: within a tick of the clock a file can change unseen


def file_hash(path: Path) -> str:
    """In hexadecimal, of the whole content, or of samples of a large compressed file."""
    state = os.stat(path)
    if state.st_size < KEPT_FROM:
        return content_hash(path)
    stamp = f"{stamp_of(state)} {SAMPLES} {SAMPLE_BYTES}"
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    kept = get_base_dir() / "fingerprints" / name
    with contextlib.suppress(OSError, ValueError), open_file(kept) as f:
        if digest := kept_hash(f.read(1000).decode(), stamp):
            return digest
    digest = content_hash(path)
    if time.time() - state.st_ctime > SETTLED_AFTER:
        with contextlib.suppress(OSError):  # a base directory that cannot be written: hashed again next time
            sync_file(path)  # after a power cut it could have its size and times, and no content
            line = f"{stamp} {digest}"
            write_atomic(kept, f"{line}\n{short_hash([line])}\n")
    return digest


def stamp_of(state: os.stat_result) -> str:
    """What differs once a file has changed: no program can set back the time of its last change."""
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def kept_hash(text: str, stamp: str) -> str:
    """The hash that a kept text holds; '' if it is of another state of the file, or damaged.

    Earlier versions kept no check beside it.
    """
    line, *check = text.splitlines() or [""]
    before, _, digest = line.rpartition(" ")
    whole = len(digest) == 64 and check in ([], [short_hash([line])])
    return digest if whole and before == stamp else ""


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
