"""The GPUs that torch can use on this machine. `python -m nanochat.devices` prints how many there are."""

import glob
import os
import warnings

from nanochat.common import run_script
from nanochat.errors import InputError, first_line

NO_GPU = ("", "-1", "none", "void", "nodevfiles")  # values of CUDA_VISIBLE_DEVICES; the last is Slurm's
ON_THE_CPU = "or train on the CPU: --device-type cpu, or CUDA_VISIBLE_DEVICES= (empty)"


def usable_gpus() -> int:
    """How many GPUs torch can use. InputError if this machine has GPUs and torch can use none of them.

    Without this error a run would train on the CPU, unnoticed for hours, if the driver is too old for torch's
    CUDA or torch was built without CUDA.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error below says the same as torch's warning
        if torch.cuda.is_available():
            return torch.cuda.device_count()
        present = 0 if gpus_disabled() else max(torch.cuda.device_count(), len(device_files()))
    if present:
        raise InputError(
            f"--device-type: this machine has {present} GPU(s), "
            f"but torch {torch.__version__} cannot use them: {cuda_error()}; "
            f"install a driver and a build of torch that fit each other, {ON_THE_CPU}"
        )
    return 0


def gpus_disabled() -> bool:
    """Whether the user or a scheduler has disabled all GPUs by CUDA_VISIBLE_DEVICES."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices is not None and devices.split(",")[0].strip().lower() in NO_GPU


def device_files() -> list[str]:
    """The device files of the NVIDIA GPUs that this process may open.

    In a container or under a scheduler there may be files of other GPUs too.
    """
    return [path for path in glob.glob("/dev/nvidia[0-9]*") if can_open(path)]


def can_open(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def cuda_error() -> str:
    """torch's message about why CUDA does not start."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        return first_line(e).rstrip(".")
    return "torch.cuda.is_available() is False"


def take_gpu(index: int):
    """Let this process use one GPU, and compute something on it. InputError if that fails."""
    import torch

    count = torch.cuda.device_count()
    if index >= count:
        raise InputError(f"--nproc_per_node: process {index} on this machine has no GPU, there are {count}")
    try:
        torch.cuda.set_device(index)
        torch.ones(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError as e:  # another process has the GPU, it is full, or torch was not built for it
        raise InputError(
            f"--device-type cuda: GPU {index} cannot be used: {first_line(e)}; "
            f"choose others with CUDA_VISIBLE_DEVICES, {ON_THE_CPU}"
        ) from None


if __name__ == "__main__":
    run_script(lambda: print(usable_gpus()))
