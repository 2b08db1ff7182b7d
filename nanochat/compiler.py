"""When blocks are compiled, and how: one block, whose machine code serves all blocks like it.

Where a compiler does not serve, the blocks stay as they are.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import partial

import torch
import torch.distributed as dist

from nanochat.attention import compiled_window
from nanochat.common import out_of_memory
from nanochat.errors import InputError, first_line
from nanochat.ops import SOFTCAP, CrossEntropy, rows_at_once
from nanochat.processes import print0

# versions that know every set of vector instructions that torch compiles for
NEW_ENOUGH = {"g++": 11, "clang++": 14}
# seconds for an empty program: a compiler that waits for a network or a licence may never end
COMPILER_PATIENCE = 60


def should_compile(args, device_type: str, flops: float) -> bool:
    """Whether --compile says so; if not, a line tells which other flags do nothing.

    flops: of the whole training.
    """
    if args.compile == "on" or (args.compile == "auto" and pays_off(device_type, flops)):
        return True
    idle = []
    if args.activation_budget < 1:
        idle.append(f"--activation-budget {args.activation_budget:g}")
    if args.attn_kernel == "flex":
        idle.append("--attn-kernel flex")
    for flag in idle:
        print0(f"{flag}: does nothing, the blocks are not compiled")
    return False


def pays_off(device_type: str, flops: float) -> bool:
    """Whether compiled blocks save more time than their compilation takes.

    On a GPU they always do. On a CPU a compilation takes 20 s, which 3e13 FLOPs on two cores win back
    (dev/LOG.md). The limit is a little higher: some minutes of training.
    """
    return device_type == "cuda" or flops >= 4e13


def compile_if_possible(model, args, device, world_size: int, one_pass):
    """Compile the blocks, and run one_pass(), forward and backward: no compiler works on the training clock.

    If that fails in one process, the model stays uncompiled in all of them, and a line says so. InputError if
    it fails under `--compile on`. args: flags, of which --compile and --activation-budget count.
    """
    trouble = compile_error(model, device, one_pass, args.activation_budget)
    troubles = [trouble]
    if world_size > 1:
        troubles = [""] * world_size
        dist.all_gather_object(troubles, trouble)
    model.zero_grad()
    if not any(troubles):
        return
    reason = next(filter(None, troubles))
    if args.compile == "on":
        raise InputError(f"--compile on: cannot compile here: {reason}; repair that, or give --compile off")
    make_eager(model)
    print0(f"--compile auto: trains uncompiled, since compiling fails here: {reason}")


def compile_error(model, device, one_pass, budget: float) -> str:
    """Compile the blocks and run one_pass(). Returns in a line why that fails, or ''.

    The state of the random numbers is afterwards what it was before.
    """
    if device.type == "cpu" and (trouble := compiler_error()):
        return trouble
    gpus = [device] if device.type == "cuda" else []
    logging.disable(logging.CRITICAL)  # torch logs pages
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(gpus):
            warnings.simplefilter("ignore")
            # of a GPU without bfloat16, whose blocks torch then leaves as they are
            warnings.filterwarnings("error", message=".*not support bfloat16 compilation")
            compile_blocks(model, budget=budget)
            one_pass()
    except Exception as e:  # of torch, triton, the compiler, the linker, the file system: no list is complete
        if device.type == "cuda" and out_of_memory(e):
            raise
        return useful_line(e)
    finally:
        logging.disable(logging.NOTSET)
    return ""


def compiler_error() -> str:
    """Why the C++ compiler that torch will call does not work, in a line; '' if it does."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch chooses it
    command = [compiler, "-x", "c++", "-fsyntax-only", os.devnull]
    with tempfile.TemporaryFile() as errors:  # a child of the compiler could hold a pipe open
        try:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                timeout=COMPILER_PATIENCE,
            )
        except subprocess.TimeoutExpired:
            return f"the C++ compiler {compiler} does not answer within {COMPILER_PATIENCE} s"
        except OSError as e:
            return f"no C++ compiler {compiler} ({e.strerror})"
        if result.returncode == 0:
            return ""
        errors.seek(0)
        reason = errors.read().decode(errors="replace").strip() or f"exit code {result.returncode}"
        return f"the C++ compiler {compiler} fails ({reason.splitlines()[0]})"


def useful_line(e: Exception) -> str:
    """The line of an error that says what is wrong: in a compiler's output its first error."""
    lines = [line.strip() for line in str(e).partition("\nOutput:\n")[2].splitlines()]
    return next((line for line in lines if re.search(r"\berror\b", line)), first_line(e))[:300]


def compile_blocks(model, backend: str = "inductor", budget: float = 1.0):
    """Compile the blocks and the loss for training; blocks of the same ranks and kind share a compilation.

    budget: the share of a block's activations that it keeps for the backward pass (--activation-budget).
    Whatever else differs between blocks is passed to them as an argument. So is the window: on a GPU each
    has a compilation of its own, on a CPU all share one. Without a gradient, as in evaluation and generation,
    blocks run uncompiled: the batches there have other shapes.
    """
    from torch._dynamo import config as dynamo  # slow to import
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    functorch.activation_memory_budget = budget
    # under a rank schedule all blocks differ
    dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * len(model.blocks))
    if inductor.cpp.vec_isa_ok is None and knows_all_vector_instructions():
        inductor.cpp.vec_isa_ok = True
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=backend)
        block._compiled_call_impl = partial(run_block, block, block._compiled_call_impl)
    compiled = torch.compile(chunk_loss, dynamic=False, fullgraph=True, backend=backend)
    model.loss = partial(compiled_loss, compiled)


def run_block(block, compiled, x, x0, *inputs):
    """Block.forward, compiled where a gradient is taken.

    One compilation serves the first block too if x and x0 are two objects there.
    """
    if not torch.is_grad_enabled():
        return block._call_impl(x, x0, *inputs)
    *rest, window, extend = inputs
    window = compiled_window(window, x, block.attn.head_dim)
    return compiled(x.view_as(x) if x is x0 else x, x0, *rest, window, extend)


def compiled_loss(compiled, x, weight, targets):
    if not torch.is_grad_enabled():
        return CrossEntropy.apply(x, weight, targets)
    return CrossEntropy.apply(x, weight, targets, compiled, rows_at_once(x, len(weight), compiled=True))


def chunk_loss(z, target, share):
    """What `ops.CrossEntropy` does with a chunk of logits, for the compiler: in two passes over each row.

    z: (n, V), before the softcap; target, share = 1/N: (n, 1) -> (part of the mean loss, gradient of z, on a
    GPU in the place of z).
    With tanh(u) = 1 - 2 / (1 + exp(2u)), which is twice as fast here.
    """
    half = 1 / (1 + torch.exp(z.to(share.dtype) * (2 / SOFTCAP)))  # (1 - tanh) / 2
    half_at_target = 1 / (1 + torch.exp(z.gather(1, target).to(share.dtype) * (2 / SOFTCAP)))
    # each row has a share of its own here, or the first pass would be one over all rows
    p = torch.exp(SOFTCAP - 2 * SOFTCAP * half) * share
    sums = p.sum(dim=-1, keepdim=True)
    loss = (share * ((sums / share).log() - SOFTCAP + 2 * SOFTCAP * half_at_target)).sum()
    hit = torch.arange(z.size(1), device=z.device) == target
    grad = ((p / sums - hit.to(share.dtype)) * share * 4 * half * (1 - half)).to(z.dtype)
    return loss, z.copy_(grad) if z.is_cuda else grad  # torch 2.11 cannot compile the former for a CPU


def make_eager(model):
    """Undo `compile_blocks`, also where it stopped on its way."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    for block in model.blocks:
        block._compiled_call_impl = None  # what nn.Module.compile sets
    vars(model).pop("loss", None)


def knows_all_vector_instructions() -> bool:
    """Whether the C++ compiler is new enough.

    Else torch compiles a program for each set that the CPU has, to see: a third of a cold start's time.
    """
    compiler = os.environ.get("CXX", "g++")  # as torch chooses it
    oldest = next(
        (version for name, version in NEW_ENOUGH.items() if os.path.basename(compiler) == name), None
    )
    if oldest is None or not shutil.which(compiler):
        return False
    output = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True).stdout
    version = output.strip().split(".")[0]
    return version.isdigit() and int(version) >= oldest
