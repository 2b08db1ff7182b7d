"""Whether torch can use the GPUs of this machine; and, as a script, how many: python -m nanochat.devices"""

import glob
import os
import warnings

from nanochat.common import InputError, first_line, run_script

NO_GPU = ("", "-1", "none", "void", "nodevfiles")  # values of CUDA_VISIBLE_DEVICES; the last is Slurm's
ON_THE_CPU = "or train on the CPU: --device-type cpu, or CUDA_VISIBLE_DEVICES= (empty)"


def usable_gpus() -> int:
    """How many GPUs torch can use. InputError where this machine has some, and torch can use none.

    With a driver too old for torch's CUDA, or a build of torch without CUDA, a run would otherwise train on
    the CPU, unnoticed for hours.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says there what is said below
        if torch.cuda.is_available():
            return torch.cuda.device_count()
        listed = 0 if hidden() else max(torch.cuda.device_count(), len(device_files()))
    if listed:
        raise InputError(
            f"--device-type: this machine has {listed} GPU(s), "
            f"but torch {torch.__version__} cannot use them: {reason()}; "
            f"install a driver and a build of torch that fit each other, {ON_THE_CPU}"
        )
    return 0


def hidden() -> bool:
    """Whether the user, or a scheduler, wants no GPU to be used."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given is not None and given.split(",")[0].strip().lower() in NO_GPU


def device_files() -> list[str]:
    """The device files of those NVIDIA GPUs that we may open. A container or a scheduler may show us files of
    other GPUs too.
    """
    return [path for path in glob.glob("/dev/nvidia[0-9]*") if opens(path)]


def opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def reason() -> str:
    """Why CUDA does not start, in torch's words."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as e:
        return first_line(e).rstrip(".")
    return "torch.cuda.is_available() is False"


def take_gpu(number: int):
    """Make this the process's GPU, and compute something on it. InputError if it does not."""
    import torch

    count = torch.cuda.device_count()
    if number >= count:
        raise InputError(f"--nproc_per_node: process {number} on this machine has no GPU, there are {count}")
    try:
        torch.cuda.set_device(number)
        torch.ones(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError as e:  # another process has it for itself, it is full, or torch was not built for it
        raise InputError(
            f"--device-type cuda: GPU {number} cannot be used: {first_line(e)}; "
            f"choose others with CUDA_VISIBLE_DEVICES, {ON_THE_CPU}"
        ) from None


if __name__ == "__main__":
    run_script(lambda: print(usable_gpus()))
