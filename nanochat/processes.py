"""The processes of a run: how many there are, which one this is, its device, and its parent."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nanochat import signals
from nanochat.errors import InputError, first_line

if TYPE_CHECKING:
    import torch

# The process that started this one, noted before torch is imported: that takes seconds, in which it may end.
STARTED_BY = {os.getpid(): os.getppid()}


class Layout(NamedTuple):
    """The numbers that a launcher gives to a process."""

    rank: int  # among all processes of the run
    local_rank: int  # among those of this machine
    size: int  # number of processes


class World(NamedTuple):
    """This process's device, its rank, and the number of processes that share the work."""

    device: "torch.device"
    rank: int = 0
    size: int = 1


def process_layout() -> Layout:
    """The layout that a launcher such as torchrun sets; (0, 0, 1) without one."""
    from nanochat.environment import launcher_layout

    return Layout(*launcher_layout())


def print0(*args, **kwargs):
    """Print on rank 0 only."""
    if process_layout().rank == 0:
        print(*args, **kwargs, flush=True)


def usable_cores() -> int:
    """The cores that this process may use, which a scheduler or a container may limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("utf-8").split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no container, or one without a limit, which reads "max"
        return cores


# ---- joining and leaving -----------------------------------------------------------------------------------


def init_process(device_type: str, alone: bool = False) -> World:
    """Take this process's device and, under torchrun, join the process group.

    device_type: see `devices.pick_device_type`. alone: the script works in one process only. InputError if
    the device or the other processes are not there.
    """
    import torch

    from nanochat import attention, cpu
    from nanochat.devices import pick_device_type, take_gpu, usable_gpus

    layout = process_layout()
    if alone and layout.size > 1:
        raise InputError(
            f"WORLD_SIZE={layout.size}: this script works in one process; start it without torchrun"
        )
    if pick_device_type(device_type) == "cuda":
        if not usable_gpus():
            raise InputError("--device-type cuda: no CUDA device on this machine; use --device-type cpu")
        take_gpu(layout.local_rank)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
        device = torch.device("cuda", layout.local_rank)
        attention.choose_kernels(device)
    else:
        cpu.keep_freed_memory()
        cpu.multiply_by_onednn()
        device = torch.device("cpu")
    world = World(device, layout.rank, layout.size)
    if world.size > 1:
        join_group(world)
    return world


def join_group(world: World):
    """Meet the other processes of this run. InputError where they do not come.

    They never do where the variables are those that an earlier launcher left behind.
    """
    import torch.distributed as dist

    from nanochat import agreement
    from nanochat.environment import WAY_OUT, check_launcher, check_rendezvous

    check_rendezvous()
    check_launcher()
    address = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
    note = f"process {world.rank} of {world.size} waits for the others: {address}"
    patience = threading.Timer(60, print, [note], {"file": sys.stderr, "flush": True})
    patience.daemon = True
    patience.start()
    on_gpu = world.device.type == "cuda"
    try:
        store = agreement.join(world.rank, world.size)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            device_id=world.device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as e:
        raise InputError(
            f"{address}: process {world.rank} of {world.size} did not find the others: "
            f"{first_line(e)}; {WAY_OUT}"
        ) from None
    finally:
        patience.cancel()


def end_process():
    """Leave the process group, if there is one."""
    from nanochat import agreement

    agreement.leave_group()
    if "torch.distributed" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


# ---- without the launcher ----------------------------------------------------------------------------------


def stop_without_launcher():
    """A process that loses its launcher (torchrun, or a sweep) saves and stops: nothing trains unwatched."""
    launcher = os.environ.pop("NANOCHAT_LAUNCHER", "")  # meant for this process alone, not for its children
    if launcher.isdecimal():
        stop_without(int(launcher))
    elif os.environ.get("RANK") and os.environ.get("TORCHELASTIC_RUN_ID"):
        stop_without(STARTED_BY.get(os.getpid(), os.getppid()))


def stop_without(parent: int, patience: float = 600):
    """Once the parent process is gone, ask this one to stop; end it `patience` seconds later."""

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        signals.launcher_gone()
        time.sleep(patience)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
