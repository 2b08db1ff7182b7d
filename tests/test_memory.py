"""Too little memory: what is said before and after, and to which flags it points."""

import re
from argparse import Namespace

import pytest
import torch

from nanochat import common, memory
from nanochat.errors import InputError
from nanochat.memory import flags_in_errors, most_rows

# torch's own message, in its length
FULL = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of 79.10 GiB of which 1 GiB "
    "is free. Process 7 has 78.00 GiB memory in use.\nSee documentation for Memory Management"
)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """A GPU that torch seems to see."""
    properties = Namespace(name="NVIDIA H100 80GB HBM3", total_memory=int(79.1 * 2**30))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: int(77.6 * 2**30))


def line_of(error: Exception, **flags) -> str:
    args = Namespace(device_batch_size=32, recompute="none", activation_budget=1.0, compile="auto")
    vars(args).update(flags)
    with pytest.raises(InputError) as e, flags_in_errors(args):
        raise error
    return str(e.value)


@pytest.mark.parametrize(
    "flags, remedies",
    [
        ({}, "a smaller --device-batch-size or --recompute block or --activation-budget 0.7"),
        ({"compile": "off"}, "a smaller --device-batch-size or --recompute block"),
        ({"activation_budget": 0.7}, "a smaller --device-batch-size or --recompute block"),
        ({"recompute": "bottleneck"}, "a smaller --device-batch-size or --recompute block"),
        ({"recompute": "block"}, "a smaller --device-batch-size"),
    ],
)
def test_a_full_gpu_is_one_line_with_the_card_the_request_and_flags_that_help(flags, remedies):
    assert line_of(torch.OutOfMemoryError(FULL), **flags) == (
        "--device-batch-size 32: out of memory: GPU 1 (NVIDIA H100 80GB HBM3), 79.1 GiB, 77.6 GiB held here, "
        f"2.50 GiB more asked for; give {remedies}"
    )


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'",
    ],
)
def test_libraries_that_find_no_memory_count_too(message):
    line = line_of(RuntimeError(message))
    assert message.splitlines()[0] in line and "--device-batch-size 32: out of memory: GPU 1" in line


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access"), MemoryError()])
def test_other_errors_pass(error):
    args = Namespace(device_batch_size=32)
    with pytest.raises(type(error)) as e, flags_in_errors(args):
        raise error
    assert e.value is error


def test_a_script_without_these_flags_names_the_card(capsys):
    def main():
        raise torch.OutOfMemoryError(FULL)

    message, _ = common.call_main(main)
    assert message.startswith(
        "out of memory: GPU 1 (NVIDIA H100 80GB HBM3), 79.1 GiB, 77.6 GiB held here, 2.50 GiB"
    )
    assert message.endswith("; give a smaller model, batch or context")


# ---- before training


def test_a_dry_run_names_the_cards_and_the_largest_batches(base_dir, corpus_dir, capsys):
    """Without a GPU too. A step of 256 rows is divided by powers of two."""
    from scripts import base_train

    flags = [
        "--data",
        corpus_dir,
        "--vocab-size",
        65536,
        "--depth",
        20,
        "--total-batch-size",
        2**19,
        "--dry-run",
    ]

    def line(*more) -> str:
        base_train.main(list(map(str, [*flags, *more])))
        return capsys.readouterr().out.splitlines()[-1]

    text = line("--dtype", "bfloat16")
    assert re.fullmatch(
        r"on a GPU \(bfloat16, compiled\): peak [\d.]+ GiB, fits on 80 GB and 141 GB; largest "
        r"--device-batch-size: \d+ on 24 GB, \d+ on 40 GB, 32 on 80 GB, 64 on 141 GB",
        text,
    )
    batches = [
        list(map(int, re.findall(r"(\d+) on", line(*more)))) for more in ((), ("--recompute", "block"))
    ]
    assert all(rows[i] <= rows[i + 1] for rows in batches for i in range(3))
    assert all(kept < recomputed for kept, recomputed in zip(*batches))
    assert "fits on no single card" in line("--depth", 200)
    cards = {"--fp8": ["24", "80", "141"], "--mlp-kernel=fused": ["80", "141"]}  # that can run it
    for flag, expected in cards.items():
        assert re.findall(r"(?:\d+|none) on (\d+) GB", line(flag)) == expected


@pytest.mark.parametrize(
    "rows_of_step, fitting, most", [(256, 40, 32), (30, 14, 10), (7, 6, 1), (8, 8, 8), (8, 0, 0)]
)
def test_the_largest_batch_divides_a_step(rows_of_step, fitting, most):
    assert most_rows(lambda rows: 10 * rows, rows_of_step, 11.0 * fitting + 1.0) == most


def test_a_run_that_may_fit_is_tried_and_one_that_cannot_is_refused(monkeypatch):
    args = Namespace(subspace="", activation_budget=1.0)
    monkeypatch.setattr(memory, "memory_bytes", lambda device_type: 40 * 2**30)
    memory.check_memory(args, {"mem/predicted_peak_bytes": 44 * 2**30}, "cuda")
    with pytest.raises(InputError, match="need at least 40.5 GiB, and there are 40.0 GiB"):
        memory.check_memory(args, {"mem/predicted_peak_bytes": 45 * 2**30}, "cuda")
