"""Public datasets on the Hugging Face hub: their names, and downloading their files.

A file appears under its name only when it is complete. HF_ENDPOINT names another host, HF_TOKEN a login.
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
from itertools import islice
from pathlib import Path

from nanochat import signals
from nanochat.arguments import LARGEST_INTEGER
from nanochat.download_index import same_kind_checksum
from nanochat.errors import InputError, first_line
from nanochat.files import is_kind, sync_file, sync_folder


@dataclass(frozen=True)
class HubSet:
    """A public dataset: files of one format in one folder.

    A file is named by the start of its path in the repository: the path may end with a hash.
    """

    repo: str
    train_file: str  # a format string for the number of the shard
    train_files: int
    val_file: str
    suffix: str = ".parquet"

    def files(self, train_files: int) -> list[str]:
        """The validation file and the first training files."""
        return [self.val_file] + [self.train_file.format(i) for i in range(train_files)]

    def local_name(self, hub_file: str) -> str:
        """The file's name on this machine: without its folder and hash in the repository."""
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
ATTEMPTS = 3  # for each file; in each one huggingface_hub makes retries of its own
MAX_LISTED = 100_000  # files of a repository's folder
SPARE_BYTES = 2**26  # for other files that this process writes during a download, such as a log


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it."""

    path: str  # in the repository
    size: int
    checksum: str  # sha256:… or git-sha1:…; '' if the hub has none


def list_files(hub_set: HubSet, names: list[str], attempts: int) -> tuple[str, dict[str, HubFile]]:
    """(the repository's current revision, {name: file} of the files it has).

    names: the starts of the files' paths. The revision is given so that one call never mixes two of them.
    InputError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, utils

    utils.logging.set_verbosity_error()  # without a line for each of its retries

    def request():
        api = HfApi()
        revision = api.dataset_info(hub_set.repo, timeout=10).sha
        folder = hub_set.train_file.rpartition("/")[0]
        tree = api.list_repo_tree(hub_set.repo, folder or None, repo_type="dataset", revision=revision)
        return revision, list(islice(tree, MAX_LISTED))

    try:
        revision, entries = with_retries(request, attempts)
    except InputError as e:
        raise InputError(
            f"cannot list dataset {hub_set.repo} at {constants.ENDPOINT}: {e} "
            "(network down? HF_ENDPOINT names another host)"
        ) from None
    files = {entry.path: entry for entry in entries if is_file(entry)}
    paths = sorted(files)
    listed = {}
    for name in names:
        path = find_path(name, hub_set.suffix, paths)
        if path is not None:
            listed[name] = HubFile(path, files[path].size, listed_checksum(files[path]))
    return revision, listed


def find_path(name: str, suffix: str, paths: list[str]) -> str | None:
    """The first path that begins with `name`, ends with `suffix` and has no more folders. paths: sorted."""
    rest = re.compile(rf"[\w.-]*{re.escape(suffix)}")
    for path in islice(paths, bisect_left(paths, name), None):
        if not path.startswith(name):
            break
        if rest.fullmatch(path, len(name)):
            return path
    return None


def is_file(entry) -> bool:
    """Whether an entry of the listing is a file with a possible path and size."""
    size = getattr(entry, "size", -1)  # a folder has none
    return isinstance(entry.path, str) and is_kind(size, int) and 0 <= size <= LARGEST_INTEGER


def listed_checksum(entry) -> str:
    """The checksum of a file's content, as the hub lists it. For a file in LFS git has only a pointer."""
    if entry.lfs:
        return f"sha256:{entry.lfs.sha256}" if is_hexadecimal(entry.lfs.sha256, 64) else ""
    return f"git-sha1:{entry.blob_id}" if is_hexadecimal(entry.blob_id, 40) else ""


def is_hexadecimal(value, length: int) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(f"[0-9a-f]{{{length}}}", value))


def download(
    hub_set: HubSet, revision: str, files: dict[Path, HubFile], staging: Path, workers: int, when_fetched
) -> dict[Path, str]:
    """Download files to their paths. Returns {path: reason} of those that failed.

    when_fetched(path, file) is called in this thread once a file is complete under its path.
    """
    from huggingface_hub import utils
    from tqdm import tqdm

    utils.disable_progress_bars()  # the bar below counts files
    pool = ThreadPoolExecutor(workers)
    futures = {}
    failures = {}
    try:
        with file_size_limit(SPARE_BYTES + max(file.size for file in files.values())):
            for path, file in files.items():
                action = functools.partial(fetch, hub_set.repo, revision, file, path, staging)
                futures[pool.submit(with_retries, action)] = path
            completed = as_completed(futures)
            for future in tqdm(completed, total=len(futures), desc=hub_set.repo, unit="file", disable=None):
                path = futures[future]
                try:
                    future.result()
                    when_fetched(path, files[path])
                except InputError as e:
                    failures[path] = f"{hub_set.repo}: {e}"
            pool.shutdown()
    except KeyboardInterrupt as e:
        signals.leave(signals.signal_number(e))  # the threads end too; no incomplete file has its final name
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(staging, ignore_errors=True)
    return failures


@contextlib.contextmanager
def file_size_limit(size: int):
    """Forbid this process to write larger files while the code inside runs: a host may send without end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(size, LARGEST_INTEGER, *limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fetch(repo: str, revision: str, file: HubFile, target: Path, staging: Path):
    """Download a file to `staging`, compare it with the hub's size and checksum, move it to `target`."""
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repo, file.path, repo_type="dataset", revision=revision, local_dir=staging))
    is_whole = path.stat().st_size == file.size
    if is_whole and file.checksum:
        is_whole = same_kind_checksum(path, file.checksum) == file.checksum
    if not is_whole:
        path.unlink()
        raise InputError(f"{file.path} arrived with another size or checksum than the hub's")
    sync_file(path)
    os.replace(path, target)
    sync_folder(target.parent)


def with_retries(action, attempts: int = ATTEMPTS):
    """action(), repeated after a failure that may be temporary. InputError with the last failure."""
    for attempt in range(attempts):
        time.sleep(attempt)
        try:
            return action()
        except Exception as e:  # from httpx, requests or xet: this depends on huggingface_hub's version
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # the disk is full: no other file will fit either
            failure = e.__cause__ or e  # huggingface_hub wraps the error in a general one
            if getattr(getattr(failure, "response", None), "status_code", None) in (401, 403, 404):
                break
    raise InputError(first_line(failure))
