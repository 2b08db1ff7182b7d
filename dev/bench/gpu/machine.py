"""Item 1: the card, its software, its two ceilings, and which attention kernel serves."""

import importlib.util
import platform
import subprocess

import numpy as np
import torch
from train_step import matmul_rate

from gpu.runner import Setting
from nanochat import devices
from nanochat.attention import chosen
from nanochat.benchmark import seconds_per_call


def measure(setting: Setting):
    result = {
        "device": devices.device_name(setting.device),
        "peak flops": devices.peak_flops(devices.device_name(setting.device)),
        **versions(setting.device),
    }
    yield result
    yield result | {
        "copy bytes per second": copy_rate(setting),
        "matmul flops per second": matmul_rate(setting.device, setting.dtype),
        "attention": {
            "whole context": chosen.get((False, True, True)),
            "window": chosen.get((True, True, True)),
        },
    }


def versions(device) -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    return found | {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gib": properties.total_memory / 2**30,
        "multiprocessors": properties.multi_processor_count,
        "nvidia-smi": driver.splitlines()[-1] if driver else "no answer",
    }


def copy_rate(setting: Setting) -> float:
    """Bytes a second, read plus written, of a copy that no cache can hold: the best of a few."""
    count = 2**22 if setting.tiny else 2**31
    source = torch.empty(count, dtype=torch.uint8, device=setting.device).random_()
    target = torch.empty_like(source)
    best = min(seconds_per_call(lambda: target.copy_(source), 3, setting.device) for _ in range(4))
    return 2 * count / best
