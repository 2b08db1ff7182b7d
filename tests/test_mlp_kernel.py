"""--mlp-kernel: where the fused kernels can be had, which MLPs they fit, what they compute and keep."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import null_gpu
import pytest
import torch
from conftest import ROOT

from nanochat import mlp_kernel
from nanochat.accounting import on_meta
from nanochat.adapters.attach import AdapterConfig, attach
from nanochat.continuation import FREE
from nanochat.errors import InputError
from nanochat.flags import build_parser
from nanochat.gpt import GPTConfig
from nanochat.mlp_kernel import check_mlp_flags, check_mlp_kernel, fits, use_mlp_kernel


@pytest.mark.parametrize(
    "device_type,dtype,has_triton,message",
    [
        ("cpu", torch.bfloat16, True, "needs a GPU, and this run is on cpu; give --mlp-kernel auto"),
        ("cuda", torch.bfloat16, False, "needs Triton, which is not installed here; give --mlp-kernel auto"),
        ("cuda", torch.float32, True, "computes in bfloat16, not float32; give .* --dtype bfloat16"),
    ],
)
def test_fused_is_an_error_where_the_kernels_cannot_run(monkeypatch, device_type, dtype, has_triton, message):
    monkeypatch.setattr(mlp_kernel, "find_spec", lambda name: True if has_triton else None)
    with pytest.raises(InputError, match=f"--mlp-kernel fused: {message}"):
        check_mlp_kernel("fused", device_type, dtype)
    for choice in ("auto", "library"):
        check_mlp_kernel(choice, device_type, dtype)


def test_fused_is_an_error_beside_other_precisions_on_every_machine():
    for flags, message in (
        (["--fp8"], "computes in bfloat16, and --fp8 in float8; give only one of them"),
        (["--dtype", "float32"], "computes in bfloat16, not float32; give --mlp-kernel auto"),
    ):
        check_mlp_flags(build_parser().parse_args(flags))
        with pytest.raises(InputError, match=f"^--mlp-kernel fused: {message}$"):
            check_mlp_flags(build_parser().parse_args([*flags, "--mlp-kernel", "fused"]))
    check_mlp_flags(build_parser().parse_args(["--mlp-kernel", "fused", "--dtype", "bfloat16"]))


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_fused_needs_the_shared_memory_of_an_h100(monkeypatch, kilobytes):
    gpu = SimpleNamespace(name="a card", shared_memory_per_block_optin=kilobytes * 2**10)
    monkeypatch.setattr(mlp_kernel, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    if kilobytes == 227:
        check_mlp_kernel("fused", "cuda", torch.bfloat16)
    else:
        with pytest.raises(InputError, match=f"needs 227 KB .* a card has {kilobytes}; give"):
            check_mlp_kernel("fused", "cuda", torch.bfloat16)


def test_a_resumed_run_may_change_it():
    assert "mlp_kernel" in FREE


@pytest.mark.parametrize(
    "changes,expected",
    [
        (dict(mlp_ranks=(320, 512)), [True, True]),
        (dict(mlp_ranks=(16, 24)), [True, False]),
        (dict(mlp_ranks=(528, 64)), [False, True]),
        (dict(mlp_ranks=(64, 64), factor_act="silu"), [True, True]),  # silu is applied outside the kernels
        (dict(matrix_ranks={"up": (64, 64), "down": (64, 0)}), [True, False]),
        (dict(mlp_ranks=(64, 64), mlp_ratio=4.01), [False, False]),
        ({}, [False, False]),
    ],
)
def test_which_mlps_the_kernels_fit(changes, expected):
    model = on_meta(GPTConfig(64, 100, 2, 10, 10, 640, **changes))
    assert [fits(block.mlp) for block in model.blocks] == expected


def test_an_mlp_with_adapters_stays_with_the_library_and_so_does_auto():
    model = on_meta(GPTConfig(64, 100, 2, 2, 2, 64, mlp_ranks=(16, 16)))
    for choice in ("auto", "library"):
        use_mlp_kernel(model, choice)
        assert not any(block.mlp.fused for block in model.blocks)
    attach(model, "a", AdapterConfig("lora", rank=2))
    assert not any(fits(block.mlp) for block in model.blocks)


# ---- the kernels -------------------------------------------------------------------------------------------


def compare_kernels(python):
    """Triton interprets the kernels on the CPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), str(ROOT / "tests/fused_mlp_check.py")]
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
    assert result.returncode == 0 and "all agree" in result.stdout, result.stderr[-3000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_compute_the_formula():
    compare_kernels(sys.executable)


class TestOnTheStub:
    pytestmark = null_gpu.marks

    def test_the_kernels_compute_the_formula(self):
        compare_kernels(null_gpu.INSTALLED / "venv/bin/python")

    def test_the_kernels_fit_a_multiprocessor(self, tmp_path):
        """Each entry of the tables compiles for an H100, within its shared memory and without spilling."""
        lines = null_gpu.run_source(RESOURCES, tmp_path)
        assert len(lines) == 9 and all(line.endswith(" 0 0") for line in lines), lines
        assert all(int(line.split()[2]) <= 227 * 2**10 for line in lines), lines

    def test_a_compiled_block_keeps_nothing_as_wide_as_the_hidden_layer(self, tmp_path):
        kept = {}
        for line in null_gpu.run_source(KEPT, tmp_path):
            if match := re.fullmatch(r"(\w+) (\w+) ([\d.]+)", line):
                kept[match[1], match[2]] = float(match[3])
        # at width 1280, hidden width 5120, rank 320, in bfloat16: the library keeps two tensors so wide, and
        # the fused kernels their matrices in bfloat16
        assert kept["library", "none"] - kept["fused", "none"] == pytest.approx(2 * 2 * 5120, rel=0.03)
        # the block's input and six products r wide
        assert kept["fused", "bottleneck"] == pytest.approx(2 * (1280 + 6 * 320), rel=0.02)


RESOURCES = """
import re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from nanochat import fused_mlp

ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
for kernel, tiles in (
    (fused_mlp.forward_kernel, fused_mlp.FORWARD_TILES),
    (fused_mlp.backward_kernel, fused_mlp.BACKWARD_TILES),
):
    for r, (rows, columns, warps, stages) in tiles.items():
        tensor = torch.empty(2**20, device="cuda", dtype=torch.bfloat16)
        tensors = (tensor,) * (4 if kernel is fused_mlp.forward_kernel else 7)
        sizes = fused_mlp.sizes_of(torch.empty(1024, r), torch.empty(r, 1024))
        compiled = kernel.warmup(
            tensors, 4096, sizes, rows, columns, num_warps=warps, num_stages=stages, grid=(1,)
        )
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(compiled.asm["ptx"])
            file.flush()
            command = [ptxas, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        spills = re.search(r"(\\d+) bytes spill stores, (\\d+) bytes spill loads", output)
        print(kernel.__name__, r, compiled.metadata.shared, *spills.groups())
"""

KEPT = """
import torch
from nanochat import recompute
from nanochat.compiler import compile_blocks
from nanochat.gpt import GPT, GPTConfig
from nanochat.mlp_kernel import use_mlp_kernel

def kept_bytes(kernel, mode, layers):
    config = GPTConfig(
        2048, 512, 1, 10, 10, 1280, window_pattern="L", attn_ranks=(320,), mlp_ranks=(320,),
        layer_map=(0,) * layers, recompute=mode,
    )
    with torch.device("cuda"):
        model = GPT(config)
        model.init_weights()
        tokens = torch.zeros(4, 2048, dtype=torch.long)
    recompute.apply(model)
    use_mlp_kernel(model, kernel)
    compile_blocks(model)
    model(tokens, tokens, torch.bfloat16).backward()
    before = torch.cuda.memory_allocated()
    loss = model(tokens, tokens, torch.bfloat16)
    return (torch.cuda.memory_allocated() - before) / tokens.numel()

for kernel, mode in (("library", "none"), ("fused", "none"), ("fused", "bottleneck")):
    torch._dynamo.reset()
    print(kernel, mode, (kept_bytes(kernel, mode, 3) - kept_bytes(kernel, mode, 1)) / 2)
"""
