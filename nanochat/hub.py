"""Public datasets on the Hugging Face hub: which there are, and how their files come here, each one whole or not at all.

HF_ENDPOINT names another host, HF_TOKEN a login.
"""
import errno
import functools
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from nanochat import signals
from nanochat.common import InputError, first_line
from nanochat.files import sha256


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
    "tinystories": HubSet("roneneldan/TinyStories", "data/train-{:05d}-of-00004", 4, "data/validation-00000-of-00001"),
    "climbmix": HubSet("karpathy/climbmix-400b-shuffle", "shard_{:05d}", 6542, "shard_06542"),
    "fineweb-edu": HubSet("karpathy/fineweb-edu-100b-shuffle", "shard_{:05d}", 1822, "shard_01822"),
    "c4": HubSet("allenai/c4", "en/c4-train.{:05d}-of-01024", 1024, "en/c4-validation.00000-of-00008", ".json.gz"),
}
ATTEMPTS = 3  # at a file, each with huggingface_hub's own retries inside


def download(hub_set: HubSet, missing: dict[str, Path], staging: Path, workers: int) -> dict[Path, str]:
    """Fetch {start of a file's path in the repository: where to put it}; return why each failed one is missing."""
    from huggingface_hub import constants, utils
    from tqdm import tqdm

    utils.disable_progress_bars()  # ours counts files
    utils.logging.set_verbosity_error()  # no line for each of its retries
    repo, host = hub_set.repo, constants.ENDPOINT
    try:
        revision, entries = persistently(lambda: list_files(hub_set))
    except InputError as e:
        raise InputError(f"cannot list dataset {repo} at {host}: {e} (network down? HF_ENDPOINT names another host)")

    pool = ThreadPoolExecutor(workers)
    futures, failures = {}, {}
    try:
        for hub_file, path in missing.items():
            entry = next((e for e in entries if e.path.startswith(hub_file)), None)
            if entry is None:
                failures[path] = f"{repo} at {host} has no file {hub_file}*{hub_set.suffix}"
            else:
                action = functools.partial(fetch, repo, revision, entry, path, staging)
                futures[pool.submit(persistently, action)] = path
        for future in tqdm(as_completed(futures), total=len(futures), desc=repo, unit="file", disable=None):
            try:
                future.result()
            except InputError as e:
                failures[futures[future]] = f"{repo}: {e}"
    except KeyboardInterrupt as e:
        signals.leave(signals.number_of(e))  # threads go on, and no file is visible before it is whole
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(staging, ignore_errors=True)
    return failures


def list_files(hub_set: HubSet):
    """The current revision of the repository, so that one call never mixes two, and the files of the set's folder."""
    from huggingface_hub import HfApi

    revision = HfApi().dataset_info(hub_set.repo, timeout=10).sha
    folder = hub_set.train_file.rpartition("/")[0]
    entries = HfApi().list_repo_tree(hub_set.repo, folder or None, repo_type="dataset", revision=revision)
    return revision, [e for e in entries if e.path.endswith(hub_set.suffix)]


def fetch(repo: str, revision: str, entry, target: Path, staging: Path):
    """Download one file next to its place, compare it with the hub's size and checksum, and only then put it there."""
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repo, entry.path, repo_type="dataset", revision=revision, local_dir=staging))
    if path.stat().st_size != entry.size or (entry.lfs and sha256(path) != entry.lfs.sha256):
        path.unlink()
        raise InputError(f"{entry.path} arrived with another size or checksum than the hub's")
    os.replace(path, target)


def persistently(action):
    """action(), repeated when it fails in a way that may pass. InputError says what failed last."""
    for attempt in range(ATTEMPTS):
        time.sleep(attempt)
        try:
            return action()
        except Exception as e:  # of httpx, requests or xet, as the version and the transport of huggingface_hub have it
            if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # and no other file will fit either
            failure = e.__cause__ or e  # huggingface_hub wraps "an error happened" around what happened
            if getattr(getattr(failure, "response", None), "status_code", None) in (401, 403, 404):
                break
    raise InputError(first_line(failure))
