"""A worker of nanochat/token_workers.py, which starts it and reads its reports.

It reads (shards, tokenizer, threads) from standard input, as a pickle of its parent. To the file descriptor
that its argument names it writes a line of JSON for each report: the number of the shard at hand (null
between two shards), the bytes of text that were read since the report before, and what was printed meanwhile.
If a shard fails the worker ends; its parent finds out why.
"""

import contextlib
import io
import json
import os
import pickle
import signal
import sys
import threading
import time

from nanochat.token_cache import Work, cache_folder, make_whole

REPORT_PAUSE = 0.5  # seconds from one report to the next


class Reports:
    """Writes reports, a few each second."""

    def __init__(self, stream):
        self.stream = stream
        self.shard = None
        self.count = 0
        self.last = time.monotonic()

    def add(self, count: int):
        """Count so many bytes of text more."""
        self.count += count
        if time.monotonic() - self.last > REPORT_PAUSE:
            self.write()

    def write(self, printed: str = ""):
        report = {"shard": self.shard, "bytes": self.count, "printed": printed}
        self.stream.write(json.dumps(report) + "\n")
        self.stream.flush()
        self.count = 0
        self.last = time.monotonic()


def main():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # Ctrl-C goes to the parent too, which says so
    shards, tokenizer, threads = pickle.load(sys.stdin.buffer)
    threading.Thread(target=end_with_parent, daemon=True).start()
    reports = Reports(os.fdopen(int(sys.argv[1]), "w", encoding="utf-8"))
    for i, shard in enumerate(shards):
        reports.shard = i
        reports.write()
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            folder = cache_folder(shard, tokenizer)
            make_whole(shard, tokenizer, folder, work=Work(threads, wait=False, report=reports.add))
        reports.shard = None
        reports.write(printed.getvalue())


def end_with_parent():
    """Standard input ends when the parent closes it, or has died."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    with contextlib.suppress(Exception):
        main()
