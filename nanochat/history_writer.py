"""Writing metrics.jsonl: one JSON object a line, only appended. Checkpoints keep a checksum of it."""

import hashlib
import json
import os
from pathlib import Path

from nanochat.errors import InputError
from nanochat.files import digest_file, open_file, path_in_errors, sync_folder

READ_SIZE = 2**20  # bytes


class HistoryWriter:
    """Appends lines. `commit` makes them survive a power cut, and returns their checksum for a checkpoint."""

    def __init__(self, path: Path):
        """Open it, or create it. Half a line at its end, which a killed process left, is cut off."""
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for as long as the run)
        with path_in_errors(path):
            self.file.truncate(end_of_lines(path))
        self.digest = digest_file(path, hashlib.sha256())
        self.size = os.path.getsize(path)
        sync_folder(path.parent)

    def append(self, entry: dict):
        line = (json.dumps(entry) + "\n").encode()
        written = 0
        with path_in_errors(self.path):  # the disk may be full
            while written < len(line):
                written += self.file.write(line[written:])
        self.digest.update(line)
        self.size += len(line)

    def commit(self) -> dict:
        """Wait until all lines are on the disk. Returns their {"bytes", "sha256"}."""
        with path_in_errors(self.path):
            os.fsync(self.file.fileno())
        return {"bytes": self.size, "sha256": self.digest.hexdigest()}

    def close(self):
        self.file.close()


def end_of_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    with path_in_errors(path), open_file(path) as f:
        end = f.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - READ_SIZE)
            f.seek(begin)
            last = f.read(end - begin).rfind(b"\n")
            if last >= 0:
                return begin + last + 1
            end = begin
    return 0


def check_history(run_folder: Path, meta: dict):
    """InputError unless metrics.jsonl begins with the lines that a checkpoint has the checksum of."""
    record = meta.get("record")
    if not record:  # the checkpoint of an earlier version
        return
    path = run_folder / "metrics.jsonl"
    size = path.stat().st_size if path.exists() else 0
    is_short = size < record["bytes"]
    if is_short or digest_file(path, hashlib.sha256(), record["bytes"]).hexdigest() != record["sha256"]:
        problem = f"has {size:,} bytes" if is_short else "was changed"
        step = meta["step"]
        raise InputError(
            f"{path}: {problem}; the checkpoint of step {step} vouches for "
            f"{record['bytes']:,} bytes of it; restore it, or go on as another run: "
            f"--init-from {run_folder.name}:{step} --model-tag NEW"
        )
