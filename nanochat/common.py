"""What every script needs: one-line errors, the base directory, locks, the device and its dtype."""

import contextlib
import errno
import functools
import os
import sys
import time
import unicodedata
from pathlib import Path

from nanochat import console, locks, signals
from nanochat.arguments import LARGEST_INTEGER
from nanochat.errors import InputError, first_line, printable
from nanochat.processes import end_process, print0, stop_without_launcher


def run_script(main, result_is_printed: bool = False):
    """Call main(). An InputError or a failing file operation becomes one line on stderr and exit code 2, a
    signal one line and `signals.exit_code`. Of several processes, all then end with that one line.

    result_is_printed: there is nothing left to do once nobody reads standard output.
    """
    console.protect(result_is_printed)
    signals.listen()
    from nanochat import agreement

    try:
        message, is_lost = fault_of(main)
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


def fault_of(main) -> tuple[str, bool]:
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
        return str(e) or "failed", False
    except OSError as e:  # permission denied, disk full, a file that vanished
        if e.errno is None:
            raise
        return f"{e.filename or 'file system'}: {e.strerror}{way_out(e)}", False
    except (MemoryError, RuntimeError) as e:
        if out_of_memory(e):
            reason = first_line(e).split("DefaultCPUAllocator: ")[-1]
            return f"out of memory ({reason}); give a smaller model, batch or context", False
        if lost := agreement.lost_connection(e):
            return lost, True
        raise


def way_out(e: OSError) -> str:
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
    ways_to_say_it = ("out of memory", "allocate memory", "not enough memory", "size calculation overflowed")
    return isinstance(e, MemoryError) or any(words in str(e).lower() for words in ways_to_say_it)


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
    given = os.environ.get("NANOCHAT_BASE_DIR")
    if given and any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in given):
        raise InputError(
            f"NANOCHAT_BASE_DIR={given}: has control characters, or is no UTF-8; give another folder"
        )
    try:
        return Path(given or "~/.cache/nanochat-lowrank").expanduser()
    except RuntimeError:  # no such user, or one without a home folder
        fault = f"={given}: no such home folder" if given else ": not set, and there is no home folder"
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
def claimed(path: Path, what: str):
    """Hold `path` for this process alone, as a locks.Lock. InputError with the holder's pid and
    host if another one has it. While the holder writes a checkpoint it is waited for: it may be an
    orphan (nanochat.writer). So is one of another machine that gives no sign of life, until it
    gives one or its lease ends.
    """
    waits = False
    first_sign = locks.last_sign_of_life(path)
    while not (lock := locks.acquire(path, wait=False)):
        holder = locks.holder(path)
        sign = locks.last_sign_of_life(path)
        may_be_gone = sign is not None and sign == first_sign
        if locks.WRITING not in holder and not may_be_gone:
            raise InputError(f"{what} is in use by {holder}; wait for it, or stop it")
        if not waits:
            print0(f"{what}: waiting for {holder}")
        waits = True
        time.sleep(0.2)
    try:
        yield lock
    finally:
        lock.close()


def memory_bytes(device_type: str) -> int:
    """All the memory of a GPU, of the machine, or of the container around us. A batch
    system may allow less.
    """
    if device_type == "cuda":
        import torch

        if not torch.cuda.is_available():  # `init_process` explains that to the user
            return LARGEST_INTEGER
        return torch.cuda.get_device_properties(0).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit, which reads "max"
        return machine


def pick_device_type(name: str) -> str:
    """'' -> 'cuda' where there is one, else 'cpu'; other names as they are.

    InputError where there is a GPU that torch cannot use.
    """
    from nanochat.devices import usable_gpus

    return name or ("cuda" if usable_gpus() else "cpu")


def compute_dtype(name: str, device_type: str, training: bool = False, before: str = ""):
    """The dtype of activations and matmuls: `name` or, for 'auto', $NANOCHAT_DTYPE, or that of the run so
    far, or what suits the device.

    On a CPU that multiplies in bfloat16 a training step takes 0.6 to 0.9 times as long as in float32
    (dev/LOG.md); what else there is to do on a CPU is done in float32.
    """
    import torch

    name = os.environ.get("NANOCHAT_DTYPE") or "auto" if name == "auto" else name
    fast = device_type == "cuda" or (training and multiplies_bfloat16())
    dtypes = {
        "auto": torch.bfloat16 if fast else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    if name not in dtypes:
        raise InputError(f"NANOCHAT_DTYPE={name}: use one of {', '.join(dtypes)}")
    return dtypes[before or name if name == "auto" else name]


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it, AVX512-BF16 or AMX."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(processor().get("flags", "").split())


@functools.cache
def processor() -> dict[str, str]:
    """What Linux tells of the first processor; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    entries = [line.split(":", 1) for line in lines if ":" in line]
    return {key.strip(): value.strip() for key, value in entries}


def device_name(device) -> str:
    """'NVIDIA H100 80GB HBM3', or the processor's model name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    import platform

    return processor().get("model name") or platform.processor() or platform.machine()
