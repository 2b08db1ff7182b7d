"""Packed rows: tokenised text (nanochat/token_cache.py) is cut into rows whose order is a pure function.

The documents of a split, each followed by one BOS token, form one long stream of slots. Row i is

    [BOS] + slots[i·T : (i+1)·T]        T = sequence length; inputs row[:-1], targets row[1:]

so every row begins with BOS, every row is full, a cut document goes on in another row, and each slot is predicted exactly
once an epoch: only the tail of less than T slots is dropped. Training visits the rows of an epoch in a random order drawn
from (seed, epoch), hence row k of training depends on (corpus, tokenizer, T, seed, k) alone.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch

from nanochat.common import InputError, get_base_dir
from nanochat.token_cache import cached_tokens

OPEN_SHARDS = 32  # of a split, memory-mapped at once: each takes an open file; some systems allow 256 of them


# ---- rows -----------------------------------------------------------------------------------------------------------


class Rows:
    """The packed rows of one split. `row(i)` is the i-th in text order, `training_row(k)` the k-th that training visits."""

    def __init__(self, shards, tokenizer, T: int, seed: int = 0):
        self.T = T
        self.seed = seed
        self.bos_id = tokenizer.bos_id
        self.vocab_size = tokenizer.vocab_size
        self.tokens = functools.lru_cache(OPEN_SHARDS)(lambda i: cached_tokens(shards[i], tokenizer))
        sizes = [len(self.tokens(i)) for i in range(len(shards))]
        self.starts = np.cumsum([0] + sizes)  # slot at which each shard begins
        self.count = int(self.starts[-1]) // T
        self.dropped = 1 - self.count * T / max(
            1, int(self.starts[-1])
        )  # fraction of slots in no row: the tail
        self._epoch = -1  # none yet
        self._order = np.empty(0, dtype=np.uint32)

    def row(self, i: int) -> np.ndarray:
        """(T + 1,) int64. InputError: numbers that are no token."""
        begin = i * self.T
        out = np.empty(self.T + 1, dtype=np.int64)
        out[0] = self.bos_id
        filled = 1
        part = int(np.searchsorted(self.starts, begin, side="right")) - 1
        while filled <= self.T:  # a row may span shards
            offset = begin + filled - 1 - int(self.starts[part])
            piece = self.tokens(part)[offset : offset + self.T + 1 - filled]
            out[filled : filled + len(piece)] = piece
            filled = filled + len(piece)
            part = part + 1
        if out.max() >= self.vocab_size:
            cache = get_base_dir() / "token_cache"
            raise InputError(
                f"{cache}: row {i} has the number {out.max()}, and there are {self.vocab_size} "
                "tokens: the disk has changed a token cache; start base_train or adapter_train "
                "with --verify, which builds it again"
            )
        return out

    def training_row(self, k: int) -> np.ndarray:
        """(T + 1,) int64; k counts on through the epochs."""
        epoch, position = divmod(k, self.count)
        if epoch != self._epoch:
            order = np.arange(self.count, dtype=np.uint32)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._epoch = epoch
            self._order = order
        return self.row(int(self._order[position]))


def batch_of(rows: list[np.ndarray], device):
    """Rows -> (inputs, targets), each (len(rows), T) on the device."""
    batch = torch.from_numpy(np.stack(rows))
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def training_batch(
    rows: Rows, first_row: int, rank: int, world_size: int, device_batch_size: int, micro_step: int, device
):
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
            return background.submit(
                training_batch, rows, 0, rank, world_size, device_batch_size, micro_step, device
            )

        ahead = prepare(first)
        for micro_step in count(first + 1):
            batch = ahead.result()
            ahead = prepare(micro_step)
            yield batch
