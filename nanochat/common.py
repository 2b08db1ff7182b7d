"""What every script needs: one-line errors, the base directory, and locks."""

import contextlib
import errno
import os
import re
import sys
import time
import unicodedata
from pathlib import Path

from nanochat import console, locks, signals
from nanochat.errors import InputError, ProcessLost, first_line, printable
from nanochat.processes import end_process, print0, stop_without_launcher


def run_script(main, result_is_printed: bool = False):
    """Call main(), and end the process with one line on standard error if it fails.

    An InputError or a failing file operation has exit code 2, a signal `signals.exit_code`. Of several
    processes all end, with that one line.
    result_is_printed: the script has nothing left to do once nobody reads standard output.
    """
    from nanochat import agreement

    console.protect(result_is_printed)
    try:
        signals.listen()
        message, is_lost = call_main(main)
        signals.main_ended()
    except KeyboardInterrupt as e:  # it may also come while an error is being reported
        number = signals.signal_number(e)
        line = f"stopped by {signals.signal_name(number)}"
        agreement.end_all(line, signals.exit_code(number))
        signals.say(line)
        sys.exit(signals.exit_code(number))
    finally:
        signals.main_ended()
    if message:
        agreement.fail(printable(message), is_lost)


def call_main(main) -> tuple[str, bool]:
    """Call main(). Returns why it failed, '' if it did not, and whether another process is gone."""
    from nanochat import agreement
    from nanochat.environment import prepare_environment

    try:
        prepare_environment()
        stop_without_launcher()
        main()
        end_process()
        return "", False
    except InputError as e:
        return str(e) or "failed", isinstance(e, ProcessLost)
    except OSError as e:  # permission denied, disk full, a file that vanished
        if e.errno is None:
            raise
        return f"{e.filename or 'file system'}: {e.strerror}{remedy(e)}", False
    except (MemoryError, RuntimeError) as e:
        if isinstance(e.__cause__, KeyboardInterrupt):  # until Python 3.11: a signal while a class is made
            raise e.__cause__ from None
        if out_of_memory(e):
            return f"{memory_shortage(e)}; give a smaller model, batch or context", False
        if lost := agreement.lost_connection(e):
            return lost, True
        raise


def remedy(e: OSError) -> str:
    """What a user can do about a file operation that failed; '' where the error says it all."""
    if e.errno == errno.ENOSPC:
        return " (free some space, then run the same command again)"
    with contextlib.suppress(InputError):  # there may be no base directory
        in_base_dir = Path(str(e.filename)).is_relative_to(get_base_dir())
        if in_base_dir and e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return " (NANOCHAT_BASE_DIR names the folder for tokenizers, token caches and runs)"
    return ""


def out_of_memory(e: Exception) -> bool:
    """Whether Python, or torch on a GPU or a processor, found too little memory."""
    ways_to_say_it = (
        "out of memory",
        "allocate memory",
        "not enough memory",
        "size calculation overflowed",
        "cublas_status_alloc_failed",
    )
    return isinstance(e, MemoryError) or any(words in str(e).lower() for words in ways_to_say_it)


def memory_shortage(e: Exception) -> str:
    """Which memory is used up, and what was asked of it: 'out of memory: GPU 0 (NVIDIA H100 …), …'."""
    reason = first_line(e).split("DefaultCPUAllocator: ")[-1]
    if not is_of_gpu(e):
        return f"out of memory ({reason})"
    import torch

    index = torch.cuda.current_device()
    gpu = torch.cuda.get_device_properties(index)
    size = gpu.total_memory / 2**30
    own = torch.cuda.memory_reserved() / 2**30
    if asked := re.search(r"Tried to allocate ([\d.]+ .iB)", reason):
        reason = f"{asked[1]} more asked for"
    return f"out of memory: GPU {index} ({gpu.name}), {size:.1f} GiB, {own:.1f} GiB held here, {reason}"


def is_of_gpu(e: Exception) -> bool:
    """Whether an error about memory comes from a GPU, its libraries or its network."""
    return "cuda" in str(e).lower()


# ---- nested dicts ------------------------------------------------------------------------------------------


def differing_entries(a: dict, b: dict, is_same, names: tuple = ()) -> list[tuple]:
    """((key, key inside, …), value in a, value in b) of each entry that differs. None: it is missing."""
    entries = []
    for key in (*a, *(key for key in b if key not in a)):
        x = a.get(key)
        y = b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            entries += differing_entries(x, y, is_same, (*names, key))
        elif not is_same(x, y):
            entries.append(((*names, key), x, y))
    return entries


# ---- files -------------------------------------------------------------------------------------------------


def get_base_dir() -> Path:
    """Where tokenizers, token caches, downloads and runs live. Nothing is created here."""
    folder = os.environ.get("NANOCHAT_BASE_DIR")
    if folder and any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in folder):
        raise InputError(
            f"NANOCHAT_BASE_DIR={folder}: has control characters, or is no UTF-8; give another folder"
        )
    try:
        return Path(folder or "~/.cache/nanochat-lowrank").expanduser()
    except RuntimeError:  # no such user, or one without a home folder
        fault = ": not set, and there is no home folder"
        if folder:
            fault = f"={folder}: there is no such home folder"
        raise InputError(f"NANOCHAT_BASE_DIR{fault}; give it a folder, for example /tmp/nanochat") from None


@contextlib.contextmanager
def locked(path: Path):
    """Hold an exclusive lock on `path` (created if needed). It is freed if its holder dies: see locks.py."""
    lock = locks.acquire(path, wait=True)
    assert lock is not None  # as it waits
    try:
        yield
    finally:
        lock.close()


@contextlib.contextmanager
def claimed(path: Path, subject: str):
    """Hold `path` for this process alone, as a locks.Lock. subject: what it protects, for messages.

    InputError with the holder's pid and host if another process has it. But a holder that writes a checkpoint
    is waited for: it may be an orphan that ends soon (see checkpoint_writer.py). So is a holder on another
    machine that gives no sign of life, until it gives one, or its lease ends.
    """
    waits = False
    first_sign = locks.last_sign_of_life(path)
    while not (lock := locks.acquire(path, wait=False)):
        holder = locks.holder(path)
        sign = locks.last_sign_of_life(path)
        may_be_gone = sign is not None and sign == first_sign
        if locks.WRITING not in holder and not may_be_gone:
            raise InputError(f"{subject} is in use by {holder}; wait for it, or stop it")
        if not waits:
            print0(f"{subject}: waiting for {holder}")
        waits = True
        time.sleep(0.2)
    try:
        yield lock
    finally:
        lock.close()
