"""Token cache and packed rows: text is tokenised once, memory-mapped, and cut into rows whose order is a pure function.

The documents of a split, each followed by one BOS token, form one long stream of slots. Row i is

    [BOS] + slots[i·T : (i+1)·T]        T = sequence length; inputs row[:-1], targets row[1:]

so every row begins with BOS, every row is full, a cut document goes on in another row, and each slot is predicted exactly
once an epoch: only the tail of less than T slots is dropped. Training visits the rows of an epoch in a random order drawn
from (seed, epoch), hence row k of training depends on (corpus, tokenizer, T, seed, k) alone.
"""
import errno
import functools
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from nanochat.common import InputError, get_base_dir, locked, process_layout
from nanochat.files import write_atomic
from nanochat.tokenizer import EncodingError

DOCUMENTS_AT_ONCE = 512
OPEN_SHARDS = 32  # of a split, memory-mapped at once: each takes an open file; some systems allow 256 of them


# ---- the token cache ------------------------------------------------------------------------------------------------

def cached_tokens(shard, tokenizer):
    """The slots of one shard as a read-only memory map, tokenised now if this (shard, tokenizer) never was.

    $NANOCHAT_BASE_DIR/token_cache/<tokenizer hash>/<shard fingerprint>/ holds tokens.bin and meta.json. It
    appears whole, by one rename; a lock makes a second process wait for the first and take over if that one
    dies. A folder that is not whole (copied in part, left by a full disk) is built again.
    """
    root = get_base_dir() / "token_cache" / tokenizer.hash
    folder = root / shard.fingerprint
    tokens = open_cache(folder, tokenizer)
    if tokens is not None:
        return tokens
    try:
        with locked(root / f".{folder.name}.lock"):
            if open_cache(folder, tokenizer) is None:
                build_cache(shard, tokenizer, folder)
    except OSError as e:
        of_cache = str(e.filename).startswith(str(root))
        if not of_cache or e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise InputError(f"{e.filename}: {e.strerror}: the tokens of {shard.name} cannot be kept there; "
                         f"make {root} writable, or let NANOCHAT_BASE_DIR name a folder of your own")
    tokens = open_cache(folder, tokenizer)
    if tokens is None:
        raise InputError(f"{folder}: just built and not whole; is another program changing this token cache?")
    return tokens


def open_cache(folder, tokenizer):
    """The slots in a cache folder as a memory map; None if there is no whole cache of this vocabulary."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        dtype, slots = np.dtype(meta["dtype"]), meta["slots"]
        size = (folder / "tokens.bin").stat().st_size
        whole = meta["vocab_size"] == tokenizer.vocab_size and size == slots * dtype.itemsize
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        return None
    if size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")


def build_cache(shard, tokenizer, folder):
    """Tokenise a shard in parallel threads (tiktoken releases the GIL) into `folder`, under its lock."""
    for left in folder.parent.glob(f"{folder.name}.building*"):  # by a builder that was killed
        shutil.rmtree(left, ignore_errors=True)
    # a name of its own: what another user left may be there to stay
    building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.building.", dir=folder.parent))
    try:
        meta = write_tokens(shard, tokenizer, building / "tokens.bin")
        write_atomic(building / "meta.json", json.dumps(meta, indent=2) + "\n")
        building.chmod(folder.parent.stat().st_mode & 0o777)  # mkdtemp's 0700 would lock colleagues out
        replace_folder(folder, building)
    except BaseException as e:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(folder)
        raise
    if meta["empty"]:
        total = meta["documents"] + meta["empty"]
        line = f"{shard.name}: {meta['empty']:,} of {total:,} documents are empty (no text, or null): skipped"
        print(line, flush=True)


def write_tokens(shard, tokenizer, path) -> dict:
    """Write the slots of a shard; returns what meta.json is to hold.

    InputError: text that cannot be read or encoded, or fewer bytes on disk than were written.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    counts = {"slots": 0, "documents": 0, "characters": 0, "empty": 0}
    documents = shard.located()
    with open(path, "wb") as f, \
            tqdm(desc=f"tokenising {shard.name}", unit=" chars", unit_scale=True, leave=False,
                 disable=True if process_layout()[0] else None) as bar:
        while batch := list(islice(documents, DOCUMENTS_AT_ONCE)):
            filled = [(place, text) for place, text in batch if text]
            for ids in encode_documents(tokenizer, filled):
                slots = np.array(ids + [tokenizer.bos_id], dtype=dtype)
                f.write(slots.tobytes())  # ndarray.tofile loses the error of a full disk
                counts["slots"] += len(slots)
            characters = sum(len(text) for _, text in filled)
            counts["documents"] += len(filled)
            counts["characters"] += characters
            counts["empty"] += len(batch) - len(filled)
            bar.update(characters)
        f.flush()
        os.fsync(f.fileno())
    size = counts["slots"] * dtype.itemsize
    if path.stat().st_size != size:
        raise InputError(f"{path}: {path.stat().st_size:,} of {size:,} bytes were written; "
                         "free some space, then run the same command again")
    return {**counts, "dtype": dtype.name, "vocab_size": tokenizer.vocab_size,
            "tokenizer_hash": tokenizer.hash, "shard": shard.name}


def encode_documents(tokenizer, documents: list[tuple[str, str]]) -> list[list[int]]:
    """Token ids of (place, text) pairs. InputError: the place of a text that the tokenizer cannot encode."""
    try:
        return tokenizer.encode_batch([text for _, text in documents], threads=os.cpu_count() or 1)
    except EncodingError as failure:
        for place, text in documents:
            try:
                tokenizer.encode_batch([text], threads=1)
            except EncodingError as e:
                raise InputError(f"{place}: {e}")
        first, last = documents[0][0], documents[-1][0]
        raise InputError(f"{first} to {last}: {failure}")  # each by itself can be encoded


def replace_folder(folder, new):
    """Put `new` in the place of `folder`, whatever is there."""
    try:
        os.replace(new, folder)
        return
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
    aside = new.with_name(f"{new.name}.before")
    os.replace(folder, aside)
    os.replace(new, folder)
    print(f"{folder}: the token cache there was not whole and is built again", flush=True)
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink()


# ---- rows -----------------------------------------------------------------------------------------------------------

class Rows:
    """The packed rows of one split. `row(i)` is the i-th in text order, `training_row(k)` the k-th that training visits."""

    def __init__(self, shards, tokenizer, T: int, seed: int = 0):
        self.T, self.seed, self.bos_id = T, seed, tokenizer.bos_id
        self.tokens = functools.lru_cache(OPEN_SHARDS)(lambda i: cached_tokens(shards[i], tokenizer))
        sizes = [len(self.tokens(i)) for i in range(len(shards))]
        self.starts = np.cumsum([0] + sizes)  # slot at which each shard begins
        self.count = int(self.starts[-1]) // T
        self.dropped = 1 - self.count * T / max(1, int(self.starts[-1]))   # fraction of slots in no row: the tail
        self._epoch, self._order = None, None

    def row(self, i: int) -> np.ndarray:
        """(T + 1,) int64."""
        begin, out = i * self.T, np.empty(self.T + 1, dtype=np.int64)
        out[0], filled = self.bos_id, 1
        part = int(np.searchsorted(self.starts, begin, side="right")) - 1
        while filled <= self.T:  # a row may span shards
            offset = begin + filled - 1 - int(self.starts[part])
            piece = self.tokens(part)[offset:offset + self.T + 1 - filled]
            out[filled:filled + len(piece)] = piece
            filled, part = filled + len(piece), part + 1
        return out

    def training_row(self, k: int) -> np.ndarray:
        """(T + 1,) int64; k counts on through the epochs."""
        epoch, position = divmod(k, self.count)
        if epoch != self._epoch:
            order = np.arange(self.count, dtype=np.uint32)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._epoch, self._order = epoch, order
        return self.row(int(self._order[position]))


def batch_of(rows: list[np.ndarray], device):
    """Rows -> (inputs, targets), each (len(rows), T) on the device."""
    batch = torch.from_numpy(np.stack(rows))
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def training_batch(rows: Rows, first_row: int, rank: int, world_size: int, device_batch_size: int, micro_step: int, device):
    """One process's part of the step that begins at row `first_row`: the processes share each micro-step's rows in order."""
    start = first_row + (micro_step * world_size + rank) * device_batch_size
    return batch_of([rows.training_row(start + i) for i in range(device_batch_size)], device)


def training_batches(rows: Rows, first_row: int, rank: int, world_size: int, device_batch_size: int, device):
    """Endless: one process's micro-batches from row `first_row` on, each prepared and sent to the device while the one before
    is in use. Pinned memory comes from torch's own cache, which does not hand it out again before the copy is done.
    """
    first = first_row // (world_size * device_batch_size)
    on_device = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
    with ThreadPoolExecutor(1, **on_device) as background:
        def prepare(micro_step):
            return background.submit(training_batch, rows, 0, rank, world_size, device_batch_size, micro_step, device)
        ahead = prepare(first)
        for micro_step in count(first + 1):
            batch, ahead = ahead.result(), prepare(micro_step)
            yield batch
