"""Tokenising much text before a run: worker processes build the token caches of all files at once.

Every process of a run starts workers on its share of the machine's cores. A worker takes the next file that
has no cache and that nobody else is tokenising, so the workers of all machines on one file system share the
files. They only prepare: afterwards each process opens the caches by `token_cache.cached_tokens`, and builds
whatever is missing. The worker's program is nanochat/token_worker.py.
"""

import contextlib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from nanochat.environment import local_world_size, python_path
from nanochat.processes import process_layout, usable_cores
from nanochat.readers import text_bytes
from nanochat.token_cache import (
    IncompleteCache,
    cache_folder,
    make_whole,
    open_cache,
    remove_unfinished_caches,
)
from nanochat.tokenizer import Tokenizer
from nanochat.units import TIME, human

SMALL_TEXT = 2**25  # bytes of text that one process tokenises in seconds: no workers for less
ESTIMATE_AFTER = 5  # seconds of work after which the rest is estimated


def build_caches(shards, tokenizer: Tokenizer):
    """Tokenise the shards that have no complete cache, if they are much text.

    InputError as from `token_cache.make_whole`.
    """
    missing = [shard for shard in shards if not is_cached(shard, tokenizer)]
    size = sum(text_bytes(path) for shard in missing for path in shard.paths)
    if not missing or size < SMALL_TEXT:
        return
    rank, _, world_size = process_layout()
    cores = max(1, usable_cores() // local_world_size(world_size))
    count = min(cores, len(missing))
    threads = max(1, cores // count)
    with contextlib.ExitStack() as stack:
        # at the end, also after Ctrl-C, when the workers have been killed
        stack.callback(remove_unfinished_caches, cache_folder(missing[0], tokenizer).parent)
        progress = stack.enter_context(Progress(size, len(missing), count, world_size))
        workers = []
        for i in range(count):
            first = (rank * count + i) * len(missing) // (world_size * count)  # each begins somewhere else
            worker = Worker(missing[first:] + missing[:first], tokenizer, threads)
            workers.append(stack.enter_context(worker))
        for worker in ended_workers(workers, progress):
            if worker.shard:  # it failed there: this process gets the same error, or succeeds
                make_whole(worker.shard, tokenizer, cache_folder(worker.shard, tokenizer))


def is_cached(shard, tokenizer: Tokenizer) -> bool:
    try:
        open_cache(cache_folder(shard, tokenizer), tokenizer)
    except IncompleteCache:
        return False
    return True


class Worker:
    """A worker process, and the shard that it is tokenising, or that it failed on."""

    def __init__(self, shards: list, tokenizer: Tokenizer, threads: int):
        """shards: in the order in which the worker tries them."""
        self.shards = shards
        self.shard = None
        reading, writing = os.pipe()  # for its reports alone: whatever it loads may print
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanochat.token_worker", str(writing)],
            stdin=subprocess.PIPE,
            pass_fds=[writing],
            env={**os.environ, "PYTHONPATH": python_path(os.environ)},
        )
        os.close(writing)
        assert self.process.stdin
        self.job = self.process.stdin  # not closed before the end: that tells the worker that we are gone
        self.lines = os.fdopen(reading, encoding="utf-8")
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            pickle.dump((shards, tokenizer, threads), self.job)
            self.job.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.job.close()

    def relay(self, reports: queue.Queue):
        """Put (this worker, report) for every line that it writes, and (this worker, None) at its end."""
        try:
            with self.lines:
                for line in self.lines:
                    reports.put((self, json.loads(line)))
        finally:
            reports.put((self, None))


def ended_workers(workers: list[Worker], progress: "Progress") -> Iterator[Worker]:
    """Yield each worker once it has ended. Meanwhile show what the workers report."""
    reports: queue.Queue = queue.Queue()
    for worker in workers:
        threading.Thread(target=worker.relay, args=(reports,), daemon=True).start()
    running = len(workers)
    while running:
        worker, report = reports.get()
        if report is None:
            running -= 1
            yield worker
            continue
        worker.shard = None if report["shard"] is None else worker.shards[report["shard"]]
        progress.add(report["bytes"])
        if report["printed"]:
            print(report["printed"], end="", flush=True)


class Progress:
    """How far this process's workers are: a bar on a terminal, else a line at the start, an estimate, an end.

    Process 0 alone shows it. It takes the other processes to be as fast as itself.
    """

    def __init__(self, size: int, files: int, workers: int, processes: int):
        self.size = size / processes  # bytes of text that this process's workers will probably have read
        self.done = 0
        self.is_estimated = False
        self.is_shown = process_layout().rank == 0
        self.text = f"{files:,} file(s), {size / 1e9:,.1f} GB of text, {workers * processes:,} worker(s)"

    def __enter__(self):
        self.started = time.monotonic()
        self.bar = tqdm(
            desc="tokenising",
            total=self.size,
            unit="B",
            unit_scale=True,
            leave=False,
            disable=None if self.is_shown else True,
        )
        self.say(f"tokenising {self.text}")
        return self

    def __exit__(self, error_type, *_):
        self.bar.close()
        if not error_type:
            self.say(f"tokenised in {human(self.seconds, TIME)}")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def say(self, line: str):
        if self.is_shown:
            self.bar.write(line, file=sys.stdout)

    def add(self, count: int):
        """Count so many bytes of text more."""
        self.done += count
        self.bar.update(count)
        if not self.is_estimated and self.done and self.seconds > ESTIMATE_AFTER:
            self.is_estimated = True
            rest = max(0, self.size - self.done) * self.seconds / self.done
            self.say(f"tokenising: about {human(rest, TIME)} to go")
