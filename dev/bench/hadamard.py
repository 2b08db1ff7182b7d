"""The fast transforms against scipy.fft.dct, on the same vector and in turn.

    python dev/bench/hadamard.py        # 2^20 numbers, float32, with the target

A round runs each transform once. Times are medians over the rounds; ratios to scipy are medians of the
rounds' ratios.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # works without an installation

import numpy as np
import scipy.fft
import torch

from nanochat import common, devices, processes
from nanochat.arguments import ArgumentParser, whole_number
from nanochat.benchmark import synchronize
from nanochat.subspace.hadamard import cosine, walsh_hadamard

TARGET = 5.0


def time_ways(ways: dict, repeats: int, device) -> dict[str, list[float]]:
    """{way: [seconds, one for each round]}. Each round runs every way once."""
    seconds = {name: [] for name in ways}
    for turn in range(repeats + 2):  # the first two compute the matrices and fill the caches
        for name, way in ways.items():
            synchronize(device)
            started = time.perf_counter()
            way()
            synchronize(device)
            if turn > 1:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main(argv=None):
    parser = ArgumentParser("Walsh-Hadamard and cosine transforms against scipy's cosine transform.")
    add = parser.add_argument
    add("--bits", type=whole_number(1, 40), default=20, help="2^this numbers")
    add("--repeats", type=whole_number(1), default=20)
    device_help = "of our transforms; '' = cuda where there is one"
    add("--device-type", choices=["", "cuda", "cpu"], default="", help=device_help)
    args = parser.parse_args(argv)
    device = processes.init_process(args.device_type).device
    x = torch.randn(2**args.bits, generator=torch.Generator().manual_seed(0))
    array = x.numpy()
    x = x.to(device)
    ways = {
        "scipy.fft.dct": lambda: scipy.fft.dct(array, norm="ortho"),
        "walsh_hadamard": lambda: walsh_hadamard(x),
        "cosine": lambda: cosine(x),
    }
    seconds = time_ways(ways, args.repeats, device)
    print(
        f"{devices.device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} thread(s); "
        f"2^{args.bits} numbers in float32\n\n"
        "| | ms | ratio to scipy | target | |\n|---|---:|---:|---:|---|"
    )
    for name, values in seconds.items():
        ratio = np.median(np.array(values) / seconds["scipy.fft.dct"])
        target = " | "
        if name == "walsh_hadamard":
            target = f"<= {TARGET:g} | {'reached' if ratio <= TARGET else 'not reached'}"
        print(f"| {name} | {np.median(values) * 1e3:.2f} | {ratio:.2f} | {target} |")


if __name__ == "__main__":
    common.run_script(main)
