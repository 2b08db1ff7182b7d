"""What every script needs: one-line errors, the base directory, atomic files, device and process group."""

import argparse
import contextlib
import errno
import functools
import math
import os
import signal
import sys
import threading
import time
import unicodedata
from pathlib import Path

from nanochat import console, locks, signals
from nanochat.errors import InputError, printable, shortened  # what others know by this module's name
from nanochat.signals import REQUEUE, stop_signals  # noqa: F401  what scripts know by this module's name

# The process that started this one, noted before torch is imported: that takes seconds, in which it may end.
STARTED_BY = {os.getpid(): os.getppid()}


def first_line(e: BaseException) -> str:
    """What an error of another library says, short enough for ours."""
    return (str(e).strip() or type(e).__name__).splitlines()[0]


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
    except KeyboardInterrupt as e:  # it may also come while a fault is put into words
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


class Flags(argparse.Namespace):
    """A script's flags: vars() holds their values, `given` the names of those that the command line gave."""

    __slots__ = ("given", "actions")  # actions: how argparse reads each of them, by name

    def take(self, values: dict, where):
        """Set flags as the file `where` has them. InputError of a value that a flag cannot have."""
        for name, value in values.items():
            if not can_be(self.actions[name], value):
                raise InputError(
                    f"{where}: flags.{name} is {quoted(str(value))}, which no run writes; restore it"
                )
        vars(self).update(values)


def can_be(action: argparse.Action, value) -> bool:
    """Whether a flag could have this value if the command line gave it, or has it by default."""
    if type(value) is type(action.default) and value == action.default:
        return True  # also where it stands for "not given"
    if value is None or isinstance(value, bool) or action.nargs == 0:
        return type(value) is type(action.default)
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        parsed = action.type(text) if callable(action.type) else text
    except (argparse.ArgumentTypeError, ValueError, TypeError):
        return False
    return parsed == value and (action.choices is None or value in action.choices)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with whole flag names, defaults shown in --help, one-line errors, and Flags as the result."""

    def __init__(self, description):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def parse_args(self, args=None) -> Flags:  # type: ignore[override]  # no namespace of the caller's
        # argparse fills in a default only where there is no value yet, so None stays where no flag was given
        nothing = argparse.Namespace(**{action.dest: None for action in self._actions})
        values = vars(super().parse_args(args, nothing))
        flags = super().parse_args(args, Flags())
        flags.actions = {action.dest: action for action in self._actions}
        flags.given = {name for name, value in values.items() if value is not None}
        return flags

    def parse_known_args(self, args=None, namespace=None):
        """`torchrun … -m MODULE -- FLAGS` keeps our flags from torchrun, which may hand the -- on."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(words[1:] if words[:1] == ["--"] else words, namespace)

    def error(self, message):
        raise InputError(message)


# ---- numbers -----------------------------------------------------------------------------------------------

LARGEST_INTEGER = 2**63 - 1  # of torch and numpy
LARGEST = 1e30  # of other numbers: float32 reaches to 3e38
SMALLEST = 1e-30  # above 0, likewise


def as_whole_number(text: str) -> int | None:
    """The whole number that a text is; None if it is none."""
    try:
        return int(text)
    except ValueError:  # so does Python call more than 4300 digits
        return None


def whole_number(minimum: int, maximum: int = LARGEST_INTEGER, off: int | None = None):
    """argparse type: an integer from minimum to maximum; or `off`, which switches off what the flag sets."""

    def parse(text):
        value = as_whole_number(text)
        if value is None or not (minimum <= value <= maximum or value == off):
            wanted = f"<= {maximum}" if value is not None and value > maximum else f">= {minimum}"
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a whole number {wanted}{or_off(off)}")
        return value

    return parse


def number(low: float = 0, high: float = LARGEST, *, above: float | None = None, off: float | None = None):
    """argparse type: a number from `low`, or above `above`, to high; or `off`, which switches
    off what the flag sets.

    It is finite, and either 0 or no nearer to 0 than float32 can tell: torch refuses others,
    or takes them for 0.
    """

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if value == off:
            return value
        inside = low <= value <= high if above is None else above < value <= high
        if not inside or 0 < abs(value) < SMALLEST:
            smallest = f"from {low:g}" if above is None else f"above {above:g} and up"
            wanted = f"{smallest} to {high:g}{or_off(off)}"
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number {wanted}")
        return value

    return parse


def or_off(off: float | None) -> str:
    return "" if off is None else f", nor {off:g}"


def quoted(text: str) -> str:
    """What the user gave, on one line."""
    return repr(shortened(text))


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


# ---- flags that several scripts have -----------------------------------------------------------------------


def device_flags(add, dtype: str):
    """--device-type and --dtype, for pick_device_type and compute_dtype. `dtype` says what is of that dtype."""
    add("--device-type", choices=["", "cuda", "cpu"], default="", help="'' = cuda where there is one")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help=dtype)


# ---- files ----------------------------------------------------------------------------------------------------------


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
        fault = (
            f"={given}: there is no such home folder" if given else ": not set, and there is no home folder"
        )
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

        if not torch.cuda.is_available():  # what that means is said by `init_process`
            return LARGEST_INTEGER
        return torch.cuda.get_device_properties(0).total_memory
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit, which reads "max"
        return machine


# ---- processes ------------------------------------------------------------------------------------------------------


def process_layout() -> tuple[int, int, int]:
    """(rank, local rank, number of processes), as torchrun sets them; (0, 0, 1) without it."""
    from nanochat.environment import layout_of_processes

    return layout_of_processes()


def print0(*args, **kwargs):
    """Print on rank 0 only."""
    if process_layout()[0] == 0:
        print(*args, **kwargs, flush=True)


def pick_device_type(name: str) -> str:
    """'' -> 'cuda' where there is one, else 'cpu'; other names as they are.

    InputError where there is a GPU that torch cannot use.
    """
    from nanochat.devices import usable_gpus

    return name or ("cuda" if usable_gpus() else "cpu")


def init_process(device_type: str, alone: bool = False):
    """Join the process group (under torchrun) and take this process's device: (device, rank, world size).

    device_type: see `pick_device_type`. alone: its work is not shared out. InputError if the device or
    the other processes are not there.
    """
    import torch

    from nanochat import cpu
    from nanochat.devices import take_gpu, usable_gpus

    rank, local_rank, world_size = process_layout()
    if alone and world_size > 1:
        raise InputError(
            f"WORLD_SIZE={world_size}: this script works in one process; start it without torchrun"
        )
    device_type = pick_device_type(device_type)
    if device_type == "cuda":
        if not usable_gpus():
            raise InputError("--device-type cuda: no CUDA device on this machine; use --device-type cpu")
        take_gpu(local_rank)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    else:
        cpu.keep_freed_memory()
        cpu.multiply_by_onednn()
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device("cpu")
    if world_size > 1:
        join_group(device, rank, world_size)
    return device, rank, world_size


def join_group(device, rank: int, world_size: int):
    """Meet the other processes of this run. InputError where they do not come.

    They never do where the variables are those that an earlier launcher left behind.
    """
    import torch.distributed as dist

    from nanochat import agreement
    from nanochat.environment import WAY_OUT, check_launcher, check_rendezvous

    check_rendezvous()
    check_launcher()
    place = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    note = f"process {rank} of {world_size} waits for the others: {place}"
    patience = threading.Timer(60, print, [note], {"file": sys.stderr, "flush": True})
    patience.daemon = True
    patience.start()
    on_gpu = device.type == "cuda"
    try:
        store = agreement.join(rank, world_size)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as e:
        raise InputError(
            f"{place}: process {rank} of {world_size} did not find the others: {first_line(e)}; {WAY_OUT}"
        ) from None
    finally:
        patience.cancel()


def stop_without_launcher():
    """A process that loses its launcher (torchrun, or a sweep) saves and stops: nothing trains unwatched."""
    told = os.environ.pop("NANOCHAT_LAUNCHER", "")  # it is ours alone, not that of what we start
    if told.isdecimal():
        stop_without(int(told))
    elif os.environ.get("RANK") and os.environ.get("TORCHELASTIC_RUN_ID"):
        stop_without(STARTED_BY.get(os.getpid(), os.getppid()))


def stop_without(parent: int, patience: float = 600):
    """Once the process that started this one is gone, ask this one to stop; end it
    `patience` seconds later.
    """

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        signals.launcher_gone()
        time.sleep(patience)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_process():
    """Leave the process group, if there is one."""
    from nanochat import agreement

    agreement.part()
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def compute_dtype(name: str, device_type: str, training: bool = False, before: str = ""):
    """The dtype of activations and matmuls: `name` or, for 'auto', $NANOCHAT_DTYPE, or that of the run so far, or what suits the device.

    On a CPU that multiplies in bfloat16 a training step takes 0.6 to 0.9 times as long as in float32 (dev/LOG.md); what else there is to
    do on a CPU is done in float32.
    """
    import torch

    name = os.environ.get("NANOCHAT_DTYPE") or "auto" if name == "auto" else name
    fast = device_type == "cuda" or (training and multiplies_bfloat16())
    known = {
        "auto": torch.bfloat16 if fast else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    if name not in known:
        raise InputError(f"NANOCHAT_DTYPE={name}: use one of {', '.join(known)}")
    return known[before or name if name == "auto" else name]


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
    return {
        key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)
    }


def device_name(device) -> str:
    """'NVIDIA H100 80GB HBM3', or the processor's model name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    import platform

    return processor().get("model name") or platform.processor() or platform.machine()
