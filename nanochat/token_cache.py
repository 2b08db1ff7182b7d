"""The token cache: each shard of text is tokenised once, and its tokens are kept in a memory-mapped file.

    $NANOCHAT_BASE_DIR/token_cache/<tokenizer hash>/<shard fingerprint>/
        tokens.bin   the slots of one shard: the tokens of its documents, with BOS after each document
        meta.json    number of slots, their type, and the SHA-256 of tokens.bin

Disks lose data silently: a write that a full disk refused can leave zeros in a file of the right size. So the
checksum is computed from the data in memory. The file on the disk is compared with it when the cache is
built, and with --verify.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanochat import locks
from nanochat.common import get_base_dir, locked
from nanochat.environment import local_world_size
from nanochat.errors import InputError
from nanochat.files import (
    NoOrdinaryFile,
    Schema,
    create_folder,
    path_in_errors,
    read_json,
    remove_temporary,
    sha256,
    sync,
    sync_folder,
    write_json,
)
from nanochat.processes import process_layout, usable_cores
from nanochat.tokenizer import EncodingError

DOCUMENT_BATCH = 512  # documents tokenised together
PAGE = 4096  # bytes: a lost write leaves at least one page of zeros
READ_BYTES = 1024 * PAGE
META = Schema(
    "description of a token cache",
    {"dtype": str, "slots": int, "vocab_size": int},
    {
        "sha256": str,
        "tokenizer_hash": str,
        "shard": str,
        "fingerprint": str,
        "documents": int,
        "characters": int,
        "empty": int,
    },
)
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

# caches of an earlier version, without a checksum, that this process has verified and cannot write to
verified_folders: set[Path] = set()


class IncompleteCache(Exception):
    """A cache that must be built again. The message says what is wrong; '' if there is no cache."""


@dataclass
class Work:
    """How a shard is tokenised."""

    threads: int
    wait: bool = True  # for another process that is tokenising the shard; else leave it to that one
    report: Callable | None = None  # called with the bytes of text of each batch; None: a progress bar


def cached_tokens(shard, tokenizer):
    """The slots of one shard as a read-only memory map. The shard is tokenised if it has no complete cache.

    A cache is written under another name and renamed once it is complete. A lock makes a second process wait
    for the first one, and take over if that one dies. An incomplete folder is built again: it may have been
    copied in part, or left by a full disk.
    """
    folder = cache_folder(shard, tokenizer)
    with contextlib.suppress(IncompleteCache):
        return open_cache(folder, tokenizer)
    make_whole(shard, tokenizer, folder)
    try:
        return open_cache(folder, tokenizer)
    except IncompleteCache:
        message = f"{folder}: just built and not whole; is another program changing this token cache?"
        raise InputError(message) from None


def cache_folder(shard, tokenizer) -> Path:
    return get_base_dir() / "token_cache" / tokenizer.hash / shard.fingerprint


def open_cache(folder: Path, tokenizer) -> np.ndarray:
    """The slots in a cache folder as a memory map. IncompleteCache also if it has no checksum."""
    meta = read_meta(folder, tokenizer)
    if "sha256" not in meta and folder not in verified_folders:
        raise IncompleteCache("it has no checksum")
    if meta["slots"] == 0:
        return np.zeros(0, dtype=meta["dtype"])
    path = folder / "tokens.bin"
    with path_in_errors(path):
        return np.memmap(path, dtype=meta["dtype"], mode="r")


def read_meta(folder: Path, tokenizer=None) -> dict:
    """The content of meta.json. IncompleteCache if the tokenizer or the size of tokens.bin does not fit."""
    try:
        meta = read_json(folder / "meta.json", META)
        tokens = os.stat(folder / "tokens.bin")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, NoOrdinaryFile) as e:
        raise IncompleteCache(f"no file {Path(e.filename).name}" if os.path.lexists(folder) else "") from None
    except InputError:
        raise IncompleteCache("its meta.json is damaged") from None
    dtype = token_dtype(meta["vocab_size"])
    expected = {"dtype": dtype.name, "tokenizer_hash": folder.parent.name, "fingerprint": folder.name}
    if tokenizer:
        expected["vocab_size"] = tokenizer.vocab_size
    for key, value in expected.items():
        if meta.get(key, value) != value:
            raise IncompleteCache(f"its meta.json has another {key}")
    if "sha256" in meta and not re.fullmatch("[0-9a-f]{64}", meta["sha256"]):
        raise IncompleteCache("its meta.json has no proper sha256")
    if not stat.S_ISREG(tokens.st_mode) or tokens.st_size != meta["slots"] * dtype.itemsize:
        raise IncompleteCache("tokens.bin has another size than meta.json says")
    return meta


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


# ---- verifying ---------------------------------------------------------------------------------------------


def verify_caches(shards, tokenizer):
    """Read all of these shards' caches. Build those that are missing or differ from their checksum.

    The processes of one machine share the work. Each machine does all of it: it may have another disk.
    """
    _, local_rank, world_size = process_layout()
    # if their number is unknown, all processes read all caches, one after another
    for shard in shards[local_rank :: local_world_size(world_size)]:
        make_whole(shard, tokenizer, cache_folder(shard, tokenizer), verify=True)


def remove_damaged(shards) -> tuple[int, int]:
    """Read all caches of these shards, of any tokenizer, and remove the damaged ones.

    Returns the number of caches, and how many of them were removed.
    """
    fingerprints = {shard.fingerprint for shard in shards}
    folders = sorted((get_base_dir() / "token_cache").glob("*/*"))
    folders = [folder for folder in folders if folder.name in fingerprints and folder.is_dir()]
    removed = 0
    for folder in folders:
        with locked(lock_path(folder)):
            try:
                check_cache(folder, None, verify=True)
            except IncompleteCache as fault:
                print(f"{folder}: removed, the token cache there was not whole ({fault})", flush=True)
                (folder / "meta.json").unlink(missing_ok=True)  # first: without it the rest is no cache
                shutil.rmtree(folder)
                removed += 1
    return len(folders), removed


def check_cache(folder: Path, tokenizer, verify: bool = False):
    """IncompleteCache, with the reason, unless the cache is complete.

    The caller has the cache's lock, or cannot write here. verify: compare all of tokens.bin with its
    checksum. A cache of an earlier version of this program has no checksum. It is read in any case, and gets
    one if nothing looks damaged.
    """
    meta = read_meta(folder, tokenizer)
    if "sha256" in meta:
        if verify and sha256(folder / "tokens.bin") != meta["sha256"]:
            raise IncompleteCache("tokens.bin differs from its checksum")
        return
    meta["sha256"] = examine(folder / "tokens.bin", token_dtype(meta["vocab_size"]), meta["vocab_size"])
    try:
        remove_temporary(folder, "meta.json")
        write_json(folder / "meta.json", meta)
    except OSError:  # a full disk, or the folder of another user: the next process reads it again
        verified_folders.add(folder)


def examine(path: Path, dtype: np.dtype, vocab_size: int) -> str:
    """The SHA-256 of a tokens.bin without a checksum.

    IncompleteCache if it has a page of zeros, as a lost write leaves it, or numbers that are no token. A text
    of zero bytes has such pages too. It is tokenised once more, and has a checksum from then on.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(READ_BYTES):
            digest.update(block)
            padded = block.ljust(-len(block) % PAGE + len(block), b"\0")
            pages = np.frombuffer(padded, np.uint64).reshape(-1, PAGE // 8)
            if not pages.any(axis=1).all():
                raise IncompleteCache("tokens.bin has pages of zeros, as lost writes leave them")
            if np.frombuffer(block, dtype).max() >= vocab_size:
                raise IncompleteCache("tokens.bin has numbers that are no token")
    return digest.hexdigest()


# ---- building ----------------------------------------------------------------------------------------------


def make_whole(shard, tokenizer, folder: Path, verify: bool = False, work: Work | None = None):
    """Build a cache unless it is complete. verify: see check_cache. work: by default, on all cores."""
    work = work or Work(usable_cores())
    root = folder.parent
    lock = None
    try:
        create_folder(root)
        lock = locks.acquire(lock_path(folder), work.wait)
        if not lock:
            return
        try:
            check_cache(folder, tokenizer, verify)
        except IncompleteCache as fault:
            build_cache(shard, tokenizer, folder, str(fault), work)
    except OSError as e:
        e.filename = e.filename or str(folder)  # an error of reading or writing names no file
        if not str(e.filename).startswith(str(root)) or e.errno not in READ_ONLY:
            raise
        try:
            check_cache(folder, tokenizer, verify)  # another user's cache can still be read
        except IncompleteCache as fault:
            reason = f" ({fault})" if str(fault) else ""
            message = f"{e.filename}: {e.strerror}: the tokens of {shard.name} cannot be kept there{reason}"
            remedy = f"make {root} writable, or let NANOCHAT_BASE_DIR name a folder of your own"
            raise InputError(f"{message}; {remedy}") from None
    finally:
        if lock:
            lock.close()


def lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def build_cache(shard, tokenizer, folder: Path, fault: str, work: Work):
    """Tokenise a shard into `folder`. The caller has its lock. fault: what is wrong with the cache there."""
    remove_unfinished_caches(folder.parent, own=folder)
    building = None
    try:
        # a new name each time: an unfinished folder of another user cannot be removed
        building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.building.", dir=folder.parent))
        meta = write_tokens(shard, tokenizer, building / "tokens.bin", work)
        write_json(building / "meta.json", meta)
        building.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp's 0700 would lock colleagues out
        replace_folder(folder, building, fault)
    except BaseException:
        if building:
            shutil.rmtree(building, ignore_errors=True)
        raise
    verified_folders.discard(folder)
    if meta["empty"]:
        total = meta["documents"] + meta["empty"]
        line = f"{shard.name}: {meta['empty']:,} of {total:,} documents are empty (no text, or null): skipped"
        print(line, flush=True)


def remove_unfinished_caches(root: Path, own: Path | None = None):
    """Remove the unfinished caches in a folder that no process is building. own: the caller has its lock."""
    for unfinished in root.glob("*.building*"):
        folder = root / unfinished.name.partition(".building")[0]
        if folder == own:
            shutil.rmtree(unfinished, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):
            if lock := locks.acquire(lock_path(folder), wait=False):
                shutil.rmtree(unfinished, ignore_errors=True)
                lock.close()


def write_tokens(shard, tokenizer, path: Path, work: Work) -> dict:
    """Write the slots of a shard; returns the content of meta.json.

    InputError if the text cannot be read or encoded, or the disk lost a part of what was written.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    bos = np.array([tokenizer.bos_id], dtype=dtype)
    digest = hashlib.sha256()
    counts = {"slots": 0, "documents": 0, "characters": 0, "empty": 0}
    documents = shard.read()
    with open(path, "wb") as f, progress_bar(shard, work) as bar, ThreadPoolExecutor(work.threads) as threads:
        encode = map if work.threads == 1 else threads.map
        while batch := list(islice(documents, DOCUMENT_BATCH)):
            nonempty = [(place, text) for place, text in batch if text]
            parts = [bos[:0]]
            for ids in encode_documents(tokenizer, nonempty, encode):
                parts += [ids.astype(dtype), bos]
            slots = np.concatenate(parts)
            f.write(slots.tobytes())  # ndarray.tofile loses the error of a full disk
            digest.update(slots)
            counts["slots"] += len(slots)
            counts["documents"] += len(nonempty)
            counts["characters"] += sum(len(text) for _, text in nonempty)
            counts["empty"] += len(batch) - len(nonempty)
            size = sum(len(text.encode()) for _, text in nonempty)
            bar.update(size)
            if work.report:
                work.report(size)
        sync(f)
    check_written(path, counts["slots"] * dtype.itemsize, digest.hexdigest())
    return {
        **counts,
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "shard": shard.name,
        "fingerprint": shard.fingerprint,
        "sha256": digest.hexdigest(),
    }


def progress_bar(shard, work: Work):
    """The progress of tokenising a shard: shown by process 0, on a terminal only."""
    is_hidden = work.report is not None or process_layout().rank > 0
    return tqdm(
        desc=f"tokenising {shard.name}",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=True if is_hidden else None,
    )


def check_written(path: Path, size: int, digest: str):
    """InputError unless the file on the disk has this size and SHA-256."""
    remedy = "free some space or take another disk, then run the same command again"
    if path.stat().st_size != size:
        raise InputError(f"{path}: {path.stat().st_size:,} of {size:,} bytes were written; {remedy}")
    if hasattr(os, "posix_fadvise"):  # drop the copy in memory, so that the disk is read
        with open(path, "rb") as f, contextlib.suppress(OSError):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if sha256(path) != digest:
        raise InputError(f"{path}: the disk gives back other bytes than were written; {remedy}")


def encode_documents(tokenizer, documents: list[tuple[str, str]], encode: Callable) -> list[np.ndarray]:
    """Token ids of (place, text) pairs. encode: `map`, or that of threads (tiktoken releases the GIL).

    InputError names the place of a text that the tokenizer cannot encode.
    """
    try:
        return list(encode(tokenizer.encode_to_array, [text for _, text in documents]))
    except EncodingError as failure:
        for place, text in documents:
            try:
                tokenizer.encode_to_array(text)
            except EncodingError as e:
                raise InputError(f"{place}: {e}") from None
        first = documents[0][0]
        last = documents[-1][0]
        raise InputError(f"{first} to {last}: {failure}") from None  # each one alone can be encoded


def replace_folder(folder: Path, new: Path, fault: str):
    """Rename `new` to `folder`, and remove what was there. The new name survives a power cut."""
    aside = new.with_name(f"{new.name}.before")
    try:
        os.replace(new, folder)
        sync_folder(folder.parent)
        return
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    os.replace(folder, aside)
    os.replace(new, folder)
    sync_folder(folder.parent)
    print(f"{folder}: the token cache there was not whole ({fault}) and is built again", flush=True)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink()
