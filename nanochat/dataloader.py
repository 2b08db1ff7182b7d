"""Packing tokenised text (nanochat/token_cache.py) into rows, and serving them in batches.

The documents of a split, each followed by one BOS token, form one long stream of slots. Row i is

    [BOS] + slots[i·T : (i+1)·T]        T = sequence length; inputs row[:-1], targets row[1:]

So every row begins with BOS and is full, and a document may continue in the next row. Each slot is predicted
exactly once in an epoch; only the last slots, fewer than T, are dropped. Training visits the rows of an epoch
in a random order that depends on (seed, epoch). So row k of training depends only on (corpus, tokenizer, T,
seed, k).
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch

from nanochat.common import get_base_dir
from nanochat.errors import InputError
from nanochat.processes import World
from nanochat.token_cache import cached_tokens

OPEN_SHARDS = 32  # memory-mapped together: each takes an open file, and some systems allow 256 of them


# ---- rows --------------------------------------------------------------------------------------------------


class Rows:
    """The packed rows of one split.

    `row(i)` is the i-th row in the order of the text, `training_row(k)` the k-th row of training.
    """

    def __init__(self, shards, tokenizer, T: int, seed: int = 0):
        self.T = T
        self.seed = seed
        self.bos_id = tokenizer.bos_id
        self.vocab_size = tokenizer.vocab_size

        @functools.lru_cache(OPEN_SHARDS)
        def tokens_of_shard(index: int) -> np.ndarray:
            return cached_tokens(shards[index], tokenizer)

        self.tokens_of_shard = tokens_of_shard
        sizes = [len(tokens_of_shard(i)) for i in range(len(shards))]
        self.starts = np.cumsum([0] + sizes)  # the first slot of each shard, and the end
        slots = int(self.starts[-1])
        self.count = slots // T
        self.dropped = 1 - self.count * T / max(1, slots)  # fraction of slots in no row
        self._epoch = -1  # the epoch of _order; none yet
        self._order = np.empty(0, dtype=np.uint32)

    def row(self, i: int) -> np.ndarray:
        """Row i in the order of the text, (T + 1,) int64. InputError if a number in it is no token."""
        begin = i * self.T
        row = np.empty(self.T + 1, dtype=np.int64)
        row[0] = self.bos_id
        length = 1
        shard = int(np.searchsorted(self.starts, begin, side="right")) - 1
        while length <= self.T:  # a row may span several shards
            offset = begin + length - 1 - int(self.starts[shard])
            part = self.tokens_of_shard(shard)[offset : offset + self.T + 1 - length]
            row[length : length + len(part)] = part
            length += len(part)
            shard += 1
        if row.max() >= self.vocab_size:
            cache = get_base_dir() / "token_cache"
            raise InputError(
                f"{cache}: row {i} has the number {row.max()}, and there are {self.vocab_size} "
                "tokens: the disk has changed a token cache; start base_train or adapter_train "
                "with --verify, which builds it again"
            )
        return row

    def training_row(self, k: int) -> np.ndarray:
        """The k-th row of training, (T + 1,) int64. k counts rows over all epochs."""
        epoch, position = divmod(k, self.count)
        if epoch != self._epoch:
            order = np.arange(self.count, dtype=np.uint32)
            np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._epoch = epoch
            self._order = order
        return self.row(int(self._order[position]))


def make_batch(rows: list[np.ndarray], device):
    """B rows -> (inputs, targets), each (B, T) int64 on the device."""
    batch = torch.from_numpy(np.stack(rows))
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def training_batch(rows: Rows, micro_step: int, device_batch_size: int, world: World):
    """One process's (inputs, targets) in one micro-step. Micro-steps count from row 0 of the training.

    The rows of a micro-step go to the processes in order of rank.
    """
    start = (micro_step * world.size + world.rank) * device_batch_size
    return make_batch([rows.training_row(start + i) for i in range(device_batch_size)], world.device)


def training_batches(rows: Rows, first_row: int, device_batch_size: int, world: World):
    """One process's micro-batches from row `first_row` on, without end.

    A thread prepares the next batch and sends it to the device while the present one is in use. torch's own
    cache of pinned memory does not reuse a block before its copy has ended.
    """
    first = first_row // (world.size * device_batch_size)
    on_gpu = world.device.type == "cuda"
    thread = {"initializer": torch.cuda.set_device, "initargs": (world.device,)} if on_gpu else {}
    with ThreadPoolExecutor(1, **thread) as background:
        following = background.submit(training_batch, rows, first, device_batch_size, world)
        for micro_step in count(first + 1):
            batch = following.result()
            following = background.submit(training_batch, rows, micro_step, device_batch_size, world)
            yield batch
