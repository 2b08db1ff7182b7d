"""Completing the folder of a downloaded set: missing files, and those that differ from the hub, are fetched.

If the hub cannot be reached, files are compared with the index of the last time (download_index.py).
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nanochat.download_index import BAD, INDEX, DownloadIndex
from nanochat.errors import InputError
from nanochat.files import remove_temporary
from nanochat.hub import ATTEMPTS, HubFile, HubSet, download, list_files


def complete_folder(
    hub_set: HubSet,
    folder: Path,
    present: dict[Path, str],
    missing: dict[Path, str],
    workers: int,
    verify: bool,
) -> dict[Path, str]:
    """Compare the present files with the hub's list. Fetch those that differ, and the missing ones.

    Returns {path: reason} of the files that could not be fetched. The caller holds the folder's lock.

    present, missing: path -> start of the file's path in the repository. verify: read all present files.
    InputError: the hub cannot be reached, and a file is missing or damaged.
    """
    remove_temporary(folder, INDEX)
    index = DownloadIndex(folder)
    staging = folder / ".incoming"
    hub_names = present | missing
    try:
        revision, listed = list_files(hub_set, list(hub_names.values()), ATTEMPTS if missing else 1)
    except InputError as e:
        if missing:
            raise
        compare_offline(index, list(present), str(e), workers, verify)
        return {}
    faults = compare(index, {path: listed.get(f) for path, f in present.items()}, workers, verify)
    for path, fault in sorted(faults.items()):
        print(f"{path}: {fault}: fetched again", flush=True)
    to_fetch = [path for path in hub_names if path in missing or path in faults]
    failures = {
        path: f"{hub_set.repo} has no file {hub_names[path]}*{hub_set.suffix}"
        for path in to_fetch
        if hub_names[path] not in listed
    }
    files = {path: listed[hub_names[path]] for path in to_fetch if path not in failures}

    def when_fetched(path: Path, file):
        index.add(path, file.size, file.checksum)
        index.save()

    if files:
        failures |= download(hub_set, revision, files, staging, workers, when_fetched)
    shutil.rmtree(staging, ignore_errors=True)  # of a killed download
    if unknown := [path for path, f in hub_names.items() if f in listed and not listed[f].checksum]:
        print(
            f"{len(unknown)} file(s) ({unknown[0].name}, …) are compared by size alone: "
            "the hub has no checksum of them"
        )
    return failures


def compare(
    index: DownloadIndex, files: dict[Path, HubFile | None], workers: int, verify: bool
) -> dict[Path, str]:
    """{path: what is wrong} of the files that differ. The index records the result.

    files: path -> the file as the hub lists it, or None if that is not known.
    """

    def find_fault(path: Path) -> str:
        file = files[path]
        return index.compare(path, file.size, file.checksum, verify) if file else index.fault(path)

    pool = ThreadPoolExecutor(workers)
    try:
        results = pool.map(find_fault, files)
        bar = tqdm(results, total=len(files), desc="comparing", unit="file", leave=False, disable=None)
        faults = dict(zip(files, bar))
    finally:  # also after Ctrl-C, so that hundreds of GB are not read twice
        pool.shutdown(cancel_futures=True)
        if any(files.values()):
            index.save()
    return {path: fault for path, fault in faults.items() if fault}


def compare_offline(index: DownloadIndex, paths: list[Path], reason: str, workers: int, verify: bool):
    """Compare files with the index, which records the hub's list of last time. InputError if one differs."""
    recorded = {}
    for path in paths:
        record = index.files.get(path.name)
        if record and record["stamp"] != BAD:
            recorded[path] = HubFile("", record["size"], record["sum"])
    faults = compare(index, {path: recorded.get(path) for path in paths}, workers, verify)
    if faults:
        path, fault = min(faults.items())
        raise InputError(f"{path} {fault}; {len(faults)} of {len(paths)} files are damaged and {reason}")
    rest = len(paths) - len(recorded)
    line = f"; {rest} of {len(paths)} were never compared" if rest else ""
    print(f"{reason}: the files are compared with the checksums of their download{line}", flush=True)
