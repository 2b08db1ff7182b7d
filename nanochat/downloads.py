"""Completing the folder of a downloaded set: fetching files that are missing or differ from the hub's list.

If the hub cannot be reached, files are compared with the index of the last time (file_sums.py).
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from nanochat.errors import InputError
from nanochat.file_sums import BAD, INDEX, FileSums
from nanochat.files import remove_temporary
from nanochat.hub import ATTEMPTS, HubFile, HubSet, download, list_files


def complete(
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
    sums = FileSums(folder)
    staging = folder / ".incoming"
    every = present | missing
    try:
        revision, listed = list_files(hub_set, list(every.values()), ATTEMPTS if missing else 1)
    except InputError as e:
        if missing:
            raise
        compare_offline(sums, list(present), str(e), workers, verify)
        return {}
    faults = compare(sums, {path: listed.get(f) for path, f in present.items()}, workers, verify)
    for path, fault in sorted(faults.items()):
        print(f"{path}: {fault}: fetched again", flush=True)
    wanted = [path for path in every if path in missing or path in faults]
    failures = {
        path: f"{hub_set.repo} has no file {every[path]}*{hub_set.suffix}"
        for path in wanted
        if every[path] not in listed
    }
    files = {path: listed[every[path]] for path in wanted if path not in failures}

    def when_fetched(path: Path, file):
        sums.add(path, file.size, file.sum)
        sums.save()

    if files:
        failures |= download(hub_set, revision, files, staging, workers, when_fetched)
    shutil.rmtree(staging, ignore_errors=True)  # of a killed download
    if unknown := [path for path, f in every.items() if f in listed and not listed[f].sum]:
        print(
            f"{len(unknown)} file(s) ({unknown[0].name}, …) are compared by size alone: "
            "the hub tells no sum of them"
        )
    return failures


def compare(sums: FileSums, files: dict[Path, HubFile | None], workers: int, verify: bool) -> dict[Path, str]:
    """{path: what is wrong} of the files that differ. The index records the result.

    files: path -> the file as the hub lists it, or None if that is not known.
    """

    def fault_of(path: Path) -> str:
        known = files[path]
        return sums.compare(path, known.size, known.sum, verify) if known else sums.fault(path)

    pool = ThreadPoolExecutor(workers)
    try:
        results = pool.map(fault_of, files)
        bar = tqdm(results, total=len(files), desc="comparing", unit="file", leave=False, disable=None)
        faults = dict(zip(files, bar))
    finally:  # also after Ctrl-C, so that hundreds of GB are not read twice
        pool.shutdown(cancel_futures=True)
        if any(files.values()):
            sums.save()
    return {path: fault for path, fault in faults.items() if fault}


def compare_offline(sums: FileSums, paths: list[Path], reason: str, workers: int, verify: bool):
    """Compare files with the index, which records the hub's list of last time. InputError if one differs."""
    known = {}
    for path in paths:
        record = sums.files.get(path.name)
        if record and record["stamp"] != BAD:
            known[path] = HubFile("", record["size"], record["sum"])
    faults = compare(sums, {path: known.get(path) for path in paths}, workers, verify)
    if faults:
        path, fault = min(faults.items())
        raise InputError(f"{path} {fault}; {len(faults)} of {len(paths)} files are damaged and {reason}")
    rest = len(paths) - len(known)
    line = f"; {rest} of {len(paths)} were never compared" if rest else ""
    print(f"{reason}: the files are compared with the sums of their download{line}", flush=True)
