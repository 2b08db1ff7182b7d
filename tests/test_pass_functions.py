"""A training pass stays short to read: few of our own functions run in it."""

import sys
from importlib import import_module

import pytest
import torch
from conftest import ROOT
from torch.utils.checkpoint import checkpoint


@pytest.fixture(scope="module")
def pass_functions():
    folder = str(ROOT / "dev/bench")
    sys.path.insert(0, folder)
    yield import_module("pass_functions")
    sys.path.remove(folder)


@pytest.mark.parametrize("model", ["full rank", "low rank"])
@pytest.mark.parametrize("device, limit", [("cuda", 15), ("cpu", 25)])
def test_few_functions_run_in_a_pass(pass_functions, device, limit, model):
    functions = pass_functions.count(device, pass_functions.MODELS[model])
    assert sum(map(len, functions.values())) <= limit, functions


def test_both_passes_are_counted(pass_functions):
    """A backward pass of our own counts, and so does what is recomputed for it."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def recomputed(x):
        again()
        return Double.apply(x).exp()

    def again():
        pass

    x = torch.ones(3, requires_grad=True)
    with pass_functions.CalledFunctions() as called:
        y = checkpoint(recomputed, x, use_reentrant=False)
        y = Double.apply(y).sum()
    forward = {code.co_name for code in called.codes if code.co_filename == __file__}
    assert forward == {"recomputed", "again", "forward"}
    with pass_functions.CalledFunctions() as called:
        torch.autograd.backward(y)
    backward = {code.co_name for code in called.codes if code.co_filename == __file__}
    assert backward == {"recomputed", "again", "forward", "backward"}
    assert called.functions_by_file() == {}  # none of these is a file of the package


def test_a_pretended_gpu_answers_for_every_tensor(pass_functions):
    x = torch.ones(2)
    with pass_functions.PretendGPU():
        y = torch.arange(2, device=x.device) + x
        assert x.is_cuda and y.is_cuda and not y.is_cpu and y.to(y.device).device.type == "cuda"
    assert not y.is_cuda and y.tolist() == [1, 2]


def test_the_command_exits_with_1_above_a_limit(pass_functions, capsys):
    pass_functions.main(["--device", "cpu", "--cpu-limit", "1000", "--names"])
    stdout = capsys.readouterr().out
    assert stdout.count("| kept |") == 2 and "cpu, low rank, gpt.py: " in stdout and "forward" in stdout
    with pytest.raises(SystemExit, match="1"):
        pass_functions.main(["--device", "cuda", "--cuda-limit", "1"])
    assert capsys.readouterr().out.count("| too many |") == 2
