"""Token cache and packed rows: text is tokenised once, memory-mapped, and cut into rows whose order is a pure function.

The documents of a split, each followed by one BOS token, form one long stream of slots. Row i is

    [BOS] + slots[i·T : (i+1)·T]        T = sequence length; inputs row[:-1], targets row[1:]

so every row begins with BOS, every row is full, a cut document goes on in another row, and each slot is predicted exactly
once an epoch: only the tail of less than T slots is dropped. Training visits the rows of an epoch in a random order drawn
from (seed, epoch), hence row k of training depends on (corpus, tokenizer, T, seed, k) alone.
"""
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice

import numpy as np
import torch
from tqdm import tqdm

from nanochat.common import InputError, get_base_dir, locked, process_layout, write_atomic

DOCUMENTS_AT_ONCE = 512


# ---- the token cache ------------------------------------------------------------------------------------------------

def cached_tokens(shard, tokenizer):
    """The slots of one shard as a read-only memory map, tokenised now if this (shard, tokenizer) never was.

    $NANOCHAT_BASE_DIR/token_cache/<tokenizer hash>/<shard fingerprint>/ holds tokens.bin and meta.json. It appears whole,
    by one rename; a lock makes a second process wait for the first and take over if that one dies.
    """
    root = get_base_dir() / "token_cache" / tokenizer.hash
    folder = root / shard.fingerprint
    if not folder.exists():
        with locked(root / f".{folder.name}.lock"):
            if not folder.exists():
                build_cache(shard, tokenizer, folder)
    meta = json.loads((folder / "meta.json").read_text())
    size = (folder / "tokens.bin").stat().st_size
    if meta["vocab_size"] != tokenizer.vocab_size or size != meta["slots"] * np.dtype(meta["dtype"]).itemsize:
        raise InputError(f"{folder}: token cache is damaged or of another vocabulary; delete this folder to build it again")
    if size == 0:
        return np.zeros(0, dtype=meta["dtype"])
    return np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")


def build_cache(shard, tokenizer, folder):
    """Tokenise a shard in parallel threads (tiktoken releases the GIL) into `folder`."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)  # left by a builder that was killed
    building.mkdir(parents=True)
    slots = documents = characters = 0
    texts = shard.documents()
    try:
        with open(building / "tokens.bin", "wb") as f, \
                tqdm(desc=f"tokenising {shard.name}", unit=" chars", unit_scale=True, leave=False,
                     disable=True if process_layout()[0] else None) as bar:
            while batch := list(islice(texts, DOCUMENTS_AT_ONCE)):
                for ids in tokenizer.encode_batch(batch, threads=os.cpu_count() or 1):
                    np.array(ids + [tokenizer.bos_id], dtype=dtype).tofile(f)
                    slots += len(ids) + 1
                documents += len(batch)
                characters += (read := sum(map(len, batch)))
                bar.update(read)
            f.flush()
            os.fsync(f.fileno())
        meta = dict(slots=slots, documents=documents, characters=characters, dtype=dtype.name,
                    vocab_size=tokenizer.vocab_size, tokenizer_hash=tokenizer.hash, shard=shard.name)
        write_atomic(building / "meta.json", json.dumps(meta, indent=2) + "\n")
        os.replace(building, folder)
    except BaseException as e:
        shutil.rmtree(building, ignore_errors=True)
        if isinstance(e, OSError) and e.filename is None:
            e.filename = str(folder)
        raise


# ---- rows -----------------------------------------------------------------------------------------------------------

class Rows:
    """The packed rows of one split. `row(i)` is the i-th in text order, `training_row(k)` the k-th that training visits."""

    def __init__(self, shards, tokenizer, T: int, seed: int = 0):
        self.T, self.seed, self.bos_id = T, seed, tokenizer.bos_id
        self.parts = [cached_tokens(shard, tokenizer) for shard in shards]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])  # slot at which each shard begins
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
            piece = self.parts[part][offset:offset + self.T + 1 - filled]
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
