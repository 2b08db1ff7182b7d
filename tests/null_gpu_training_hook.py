"""Runs before a script that trains on the null GPU, after null_gpu_hook.py.

Numbers that a program reads from the GPU decide whether it goes on: they are 0 here, so no process asks
another to stop. NULL_GPU_DIES_AT: the training step after whose line the process ends at once.
"""

import os

import torch

from nanochat import loss_eval, step_metrics

read_list = torch.Tensor.tolist
evaluate = loss_eval.evaluate
step_line = step_metrics.step_line


def zeros(tensor):
    return read_list(torch.zeros_like(tensor, device="cpu") if tensor.is_cuda else tensor)


def evaluate_or_invent(*args):
    try:
        return evaluate(*args)
    except ZeroDivisionError:  # by the number of tokens
        pass
    except RuntimeError as e:  # the tokens that have bytes are as many as garbage says
        if "overflow" not in str(e) and "out of memory" not in str(e):
            raise
    return {"val/loss": 5.0, "val/ppl": 148.0, "val/bpb": 2.0}


def step_line_or_death(run, state, result):
    if str(state.step) == os.environ.get("NULL_GPU_DIES_AT"):
        os._exit(9)
    return step_line(run, state, result)


torch.Tensor.tolist = zeros
loss_eval.evaluate = evaluate_or_invent
step_metrics.step_line = step_line_or_death
