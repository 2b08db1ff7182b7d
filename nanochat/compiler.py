"""When blocks are compiled, and how: one block, whose machine code serves all blocks like it."""
import os
import shutil
import subprocess

import torch

from nanochat.functional import loss_of_logits_to_compile

NEW_ENOUGH = {"g++": 11, "clang++": 14}  # versions that know every set of vector instructions that torch compiles for


def pays(device_type: str, flops: float) -> bool:
    """On a GPU always. On a CPU it takes a third of a minute, which 3e13 FLOPs on two cores win back (dev/LOG.md), and needs a C++ compiler:
    from 4e13 FLOPs on, minutes of training.
    """
    return device_type == "cuda" or (flops >= 4e13 and any(map(shutil.which, ("g++", "c++", "clang++"))))


def compile_blocks(model, backend: str = "inductor"):
    """Compile the blocks and the loss for training; one compilation serves all blocks of the same ranks and kind.

    Everything in which blocks differ otherwise is an argument; a window too, except where some layers have a mask and others none. Evaluation and generation stay eager (`GPT.eager`): their batches
    have other shapes.
    """
    from torch._dynamo import config as dynamo  # slow to import
    from torch._inductor import config as inductor
    dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * len(model.blocks))  # under a rank schedule all blocks differ
    if inductor.cpp.vec_isa_ok is None and knows_all_vector_instructions():
        inductor.cpp.vec_isa_ok = True
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend=backend)
    model.of_logits = torch.compile(loss_of_logits_to_compile, dynamic=False, fullgraph=True, backend=backend)
    model.compiled = True


def knows_all_vector_instructions() -> bool:
    """Whether the C++ compiler is new enough. Else torch compiles a program for each set that the CPU has, to see, which is a third of
    the time that a cold start takes on a CPU.
    """
    compiler = os.environ.get("CXX", "g++")  # as torch chooses it
    oldest = next((version for name, version in NEW_ENOUGH.items() if os.path.basename(compiler) == name), None)
    if oldest is None or not shutil.which(compiler):
        return False
    version = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True).stdout.strip().split(".")[0]
    return version.isdigit() and int(version) >= oldest
