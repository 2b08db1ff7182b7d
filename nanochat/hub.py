"""Public datasets on the Hugging Face hub: which there are, and how their files come here, each one whole or not at all.

HF_ENDPOINT names another host, HF_TOKEN a login.
"""

import contextlib
import errno
import functools
import os
import re
import resource
import shutil
import time
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

from nanochat import signals
from nanochat.common import LARGEST_INTEGER, InputError, first_line
from nanochat.file_sums import sum_of
from nanochat.files import is_kind, sync_file, sync_folder


@dataclass(frozen=True)
class HubSet:
    """A public dataset: files of one kind in one folder. They are given by the start of their path in the repository."""

    repo: str
    train_file: str  # to be formatted with the number of the shard
    train_files: int
    val_file: str
    suffix: str = ".parquet"

    def files(self, train_files: int) -> list[str]:
        """The validation file and the first training files."""
        return [self.val_file] + [self.train_file.format(i) for i in range(train_files)]

    def local_name(self, hub_file: str) -> str:
        """Without the folder and the hash that the file may have in the repository."""
        return hub_file.rpartition("/")[2] + self.suffix


HUB_SETS = {
    "tinystories": HubSet(
        "roneneldan/TinyStories", "data/train-{:05d}-of-00004", 4, "data/validation-00000-of-00001"
    ),
    "climbmix": HubSet("karpathy/climbmix-400b-shuffle", "shard_{:05d}", 6542, "shard_06542"),
    "fineweb-edu": HubSet("karpathy/fineweb-edu-100b-shuffle", "shard_{:05d}", 1822, "shard_01822"),
    "c4": HubSet(
        "allenai/c4", "en/c4-train.{:05d}-of-01024", 1024, "en/c4-validation.00000-of-00008", ".json.gz"
    ),
}
ATTEMPTS = 3  # at a file, each with huggingface_hub's own retries inside
MOST_LISTED = 100_000  # files of a repository's folder
SPARE = 2**26  # bytes by which other files that are written meanwhile, such as a log, may be larger


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it."""

    path: str  # in the repository
    size: int
    sum: str  # see file_sums.sum_of; '' where the hub tells none


def list_files(hub_set: HubSet, names: list[str], attempts: int) -> tuple[str, dict[str, HubFile]]:
    """The current revision of the repository, so that one call never mixes two, and what it has of the files.

    names: the starts of their paths, which are the keys of the result. InputError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, utils

    utils.logging.set_verbosity_error()  # no line for each of its retries

    def request():
        api = HfApi()
        revision = api.dataset_info(hub_set.repo, timeout=10).sha
        folder = hub_set.train_file.rpartition("/")[0]
        tree = api.list_repo_tree(hub_set.repo, folder or None, repo_type="dataset", revision=revision)
        return revision, list(islice(tree, MOST_LISTED))

    try:
        revision, entries = persistently(request, attempts)
    except InputError as e:
        raise InputError(
            f"cannot list dataset {hub_set.repo} at {constants.ENDPOINT}: {e} "
            "(network down? HF_ENDPOINT names another host)"
        )
    rest = re.compile(rf"[\w.-]*{re.escape(hub_set.suffix)}")  # of a path: it is in no other folder
    files = {entry.path: entry for entry in entries if is_file(entry)}
    paths = sorted(files)
    listed = {}
    for name in names:
        from_name = islice(paths, bisect_left(paths, name), None)
        same_start = takewhile(lambda path: path.startswith(name), from_name)
        path = next((path for path in same_start if rest.fullmatch(path, len(name))), None)
        if path is not None:
            listed[name] = HubFile(path, files[path].size, listed_sum(files[path]))
    return revision, listed


def is_file(entry) -> bool:
    """Whether an entry of the listing is a file of which path and size make sense."""
    size = getattr(entry, "size", -1)  # a folder has none
    return isinstance(entry.path, str) and is_kind(size, int) and 0 <= size <= LARGEST_INTEGER


def listed_sum(entry) -> str:
    """What the hub says of a file's content. Where a file is in LFS, git's blob is a pointer to it."""
    if entry.lfs:
        return f"sha256:{entry.lfs.sha256}" if is_hexadecimal(entry.lfs.sha256, 64) else ""
    return f"git-sha1:{entry.blob_id}" if is_hexadecimal(entry.blob_id, 40) else ""


def is_hexadecimal(value, length: int) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(f"[0-9a-f]{{{length}}}", value))


def download(
    hub_set: HubSet, revision: str, wanted: dict[Path, HubFile], staging: Path, workers: int, when_fetched
) -> dict[Path, str]:
    """Fetch {where to put it: file}; return why each failed one is missing.

    when_fetched(path, file) is called, in this thread, once a file is in its place to stay.
    """
    from huggingface_hub import utils
    from tqdm import tqdm

    utils.disable_progress_bars()  # ours counts files
    pool = ThreadPoolExecutor(workers)
    futures = {}
    failures = {}
    try:
        with files_no_larger_than(SPARE + max(file.size for file in wanted.values())):
            for path, file in wanted.items():
                action = functools.partial(fetch, hub_set.repo, revision, file, path, staging)
                futures[pool.submit(persistently, action)] = path
            for future in tqdm(
                as_completed(futures), total=len(futures), desc=hub_set.repo, unit="file", disable=None
            ):
                path = futures[future]
                try:
                    future.result()
                    when_fetched(path, wanted[path])
                except InputError as e:
                    failures[path] = f"{hub_set.repo}: {e}"
            pool.shutdown()
    except KeyboardInterrupt as e:
        signals.leave(signals.signal_number(e))  # threads go on, and no file is visible before it is whole
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(staging, ignore_errors=True)
    return failures


@contextlib.contextmanager
def files_no_larger_than(size: int):
    """While this lasts, the system lets this process write no larger file: a host may send without an end."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = [size, *(limit for limit in (before, most) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(*limits, LARGEST_INTEGER), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def fetch(repo: str, revision: str, file: HubFile, target: Path, staging: Path):
    """Download one file next to its place, compare it with the hub's size and sum, and then put it there."""
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repo, file.path, repo_type="dataset", revision=revision, local_dir=staging))
    if path.stat().st_size != file.size or (file.sum and sum_of(path, file.sum) != file.sum):
        path.unlink()
        raise InputError(f"{file.path} arrived with another size or checksum than the hub's")
    sync_file(path)
    os.replace(path, target)
    sync_folder(target.parent)


def persistently(action, attempts: int = ATTEMPTS):
    """action(), repeated when it fails in a way that may pass. InputError says what failed last."""
    for attempt in range(attempts):
        time.sleep(attempt)
        try:
            return action()
        except (
            Exception
        ) as e:  # of httpx, requests or xet, as the version and the transport of huggingface_hub have it
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # and no other file will fit either
            failure = e.__cause__ or e  # huggingface_hub wraps "an error happened" around what happened
            if getattr(getattr(failure, "response", None), "status_code", None) in (401, 403, 404):
                break
    raise InputError(first_line(failure))
