"""The device that computes, a GPU or the processor: its type, its name, and the dtype that suits it.

`python -m nanochat.devices` prints how many GPUs there are.
"""

import contextlib
import functools
import glob
import os
import re
import resource
import warnings
from pathlib import Path

from nanochat.common import run_script
from nanochat.errors import InputError, first_line

NO_GPU = ("", "-1", "none", "void", "nodevfiles")  # values of CUDA_VISIBLE_DEVICES; the last is Slurm's
ON_THE_CPU = "or train on the CPU: --device-type cpu, or CUDA_VISIBLE_DEVICES= (empty)"


def pick_device_type(name: str) -> str:
    """'' -> 'cuda' where there is one, else 'cpu'; other names as they are.

    InputError where there is a GPU that torch cannot use.
    """
    return name or ("cuda" if usable_gpus() else "cpu")


def compute_dtype(name: str, device_type: str, training: bool = False, run_dtype: str = ""):
    """The dtype of activations and matmuls.

    It is `name` or, for 'auto', $NANOCHAT_DTYPE, else run_dtype (that of the run so far), else what suits the
    device.

    On a CPU that multiplies in bfloat16 a training step takes 0.6 to 0.9 times as long as in float32
    (dev/LOG.md). Other work on a CPU is done in float32.
    """
    import torch

    if name == "auto":
        name = os.environ.get("NANOCHAT_DTYPE") or "auto"
    fast = device_type == "cuda" or (training and multiplies_bfloat16())
    dtypes = {
        "auto": torch.bfloat16 if fast else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    if name not in dtypes:
        raise InputError(f"NANOCHAT_DTYPE={name}: use one of {', '.join(dtypes)}")
    if name == "auto" and run_dtype:
        name = run_dtype
    return dtypes[name]


def device_name(device) -> str:
    """'NVIDIA H100 80GB HBM3', or the processor's model name."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    import platform

    return processor().get("model name") or platform.processor() or platform.machine()


# ---- GPUs --------------------------------------------------------------------------------------------------


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


# ---- the processor -----------------------------------------------------------------------------------------


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it, AVX512-BF16 or AMX."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(processor().get("flags", "").split())


@functools.cache
def processor() -> dict[str, str]:
    """The entries of /proc/cpuinfo for the first processor; {} where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    entries = [line.split(":", 1) for line in lines if ":" in line]
    return {key.strip(): value.strip() for key, value in entries}


# ---- speed and memory --------------------------------------------------------------------------------------

# bfloat16 peak of one GPU in FLOP/s, of dense matrices, summed in float32, from the makers' data sheets; for
# train/mfu and train/hfu. Words of the name that CUDA reports: the longest entry that it holds counts.
PEAK_FLOPS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,  # SXM
    "H200 NVL": 835e12,
    "H100": 989e12,  # SXM: "NVIDIA H100 80GB HBM3"
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX A6000": 154.8e12,
    "RTX 6000 Ada": 364.2e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI325X": 1307e12,
    "MI355X": 2500e12,
}
OTHER_CARDS = {"MIG", "Laptop", "Ti", "D"}  # words of a slice of a GPU, or of another GPU of nearly that name


def peak_flops(gpu: str) -> float | None:
    """The peak of a GPU of this name in FLOP/s; None for a CPU or an unknown GPU."""
    words = re.split(r"[ -]", gpu)
    if not OTHER_CARDS.isdisjoint(words):
        return None
    padded = f" {' '.join(words)} "
    known = [name for name in PEAK_FLOPS if f" {name} " in padded]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def reset_peak_memory(device):
    """Start to measure the peak memory again, if the platform can (CUDA, Linux)."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif os.path.exists("/proc/self/clear_refs"):
        # A container may forbid this. Then the peak is that since the start of the process.
        with contextlib.suppress(OSError):
            # sets VmHWM, the peak, to the present resident size
            Path("/proc/self/clear_refs").write_text("5", "utf-8")


def peak_memory_bytes(device) -> int:
    """CUDA: the most bytes that torch allocated on its GPU. CPU: the peak resident set of the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):
        for line in Path("/proc/self/status").read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes


if __name__ == "__main__":
    run_script(lambda: print(usable_gpus()))
