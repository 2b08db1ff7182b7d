"""Where nothing can be compiled: --compile auto says so in a line and trains what --compile off trains."""

import os
import warnings

import pytest
import torch
from conftest import TINY, losses
from processes import Launched

from nanochat import compiler, metrics
from nanochat.flags import build_parser
from scripts import base_train

WARNING = "--compile auto: trains uncompiled, since compiling fails here: "
FALSE = "the C++ compiler /bin/false fails (exit code 1)"


def train_compiled(flags, environment):
    """base_train where compiling pays off."""
    os.environ.update(environment)
    compiler.pays_off = lambda *_: True
    base_train.main(flags)


def train_where_rank_1_cannot_compile(flags):
    compiler.compile_blocks = lambda model, budget: None  # rank 0 has no trouble
    train_compiled(flags, {"CXX": "/bin/false"} if os.environ["RANK"] == "1" else {})


def before_the_first_step(output) -> list[str]:
    """The lines between the plan and the first step."""
    lines = output.read_text().splitlines()
    plan = next(i for i, line in enumerate(lines) if line.startswith("run: "))
    return [line for line in lines[plan + 1 :] if not line.startswith(("step 0000", "finished: "))]


# torch itself finds the second, late
@pytest.mark.parametrize(
    "environment, reason",
    [({"CXX": "/bin/false"}, FALSE), ({"TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache"}, "Not a directory")],
)
def test_a_run_that_cannot_be_compiled_is_the_uncompiled_one_to_the_bit(
    train, corpus_dir, tmp_path, environment, reason
):
    straight = train("--num-iterations", 3, "--attn-rank", 4, tag="straight")
    output = tmp_path / "output"
    flags = [
        *TINY,
        "--data",
        str(corpus_dir),
        "--num-iterations",
        "3",
        "--attn-rank",
        "4",
        "--model-tag",
        "auto",
    ]
    assert Launched(1, output, train_compiled, flags, environment).codes() == [0], output.read_text()[-2000:]
    [line] = before_the_first_step(output)
    assert line.startswith(WARNING) and reason in line
    run = metrics.load_run(metrics.runs_dir() / "auto")
    assert losses(run) == losses(straight) and run.summary["val/loss"] == straight.summary["val/loss"]


def test_what_was_asked_to_be_compiled_and_cannot_be_is_refused_in_a_line(base_dir, corpus_dir, tmp_path):
    flags = [*TINY, "--data", str(corpus_dir), "--compile", "on"]
    output = tmp_path / "output"
    assert Launched(1, output, train_compiled, flags, {"CXX": "/bin/false"}).codes() == [2]
    assert before_the_first_step(output) == [
        f"error: --compile on: cannot compile here: {FALSE}; repair that, or give --compile off"
    ]


def test_where_one_process_cannot_compile_none_does(base_dir, corpus_dir, tmp_path):
    flags = [*TINY, "--data", str(corpus_dir), "--num-iterations", "2"]
    output = tmp_path / "output"
    assert Launched(2, output, train_where_rank_1_cannot_compile, flags).codes() == [0, 0], output.read_text()
    assert before_the_first_step(output) == [WARNING + FALSE]


def test_a_gpu_that_torch_compiles_nothing_for_is_a_reason(monkeypatch):
    """Torch only warns there, and leaves the blocks as they are."""

    def one_pass():
        warnings.warn("Tesla V100 does not support bfloat16 compilation natively, skipping", stacklevel=2)

    monkeypatch.setattr(compiler, "compile_blocks", lambda model, budget: None)
    monkeypatch.setattr(compiler, "compiler_error", lambda: "")
    reason = compiler.compile_error(None, torch.device("cpu"), one_pass, 1.0)
    assert reason == "Tesla V100 does not support bfloat16 compilation natively, skipping"
    assert not compiler.compile_error(
        None, torch.device("cpu"), lambda: warnings.warn("other", stacklevel=2), 1.0
    )


def test_flags_that_do_nothing_uncompiled_are_named(capsys):
    flags = ["--compile", "off", "--activation-budget", "0.7", "--attn-kernel", "flex"]
    assert not compiler.should_compile(build_parser().parse_args(flags), "cuda", 1e20)
    assert capsys.readouterr().out.splitlines() == [
        "--activation-budget 0.7: does nothing, the blocks are not compiled",
        "--attn-kernel flex: does nothing, the blocks are not compiled",
    ]
    assert compiler.should_compile(build_parser().parse_args(flags[2:]), "cuda", 1e20)
    assert not compiler.should_compile(build_parser().parse_args(flags[:2]), "cuda", 1e20)
    assert not capsys.readouterr().out


def test_the_reason_is_the_line_that_says_it(tmp_path, monkeypatch):
    error = RuntimeError(
        "CppCompileError: C++ compile error\n\nCommand:\ng++ x.cpp -Werror=no\n\nOutput:\n"
        "In file included from x.cpp:1:\n"
        "x.h:3:10: fatal error: omp.h: No such file or directory\n"
        "compilation terminated.\n\nSet TORCH_LOGS"
    )
    assert compiler.useful_line(error) == "x.h:3:10: fatal error: omp.h: No such file or directory"
    assert compiler.useful_line(ValueError("first\nsecond")) == "first"
    assert compiler.useful_line(ValueError()) == "ValueError"
    monkeypatch.setattr(compiler, "COMPILER_PATIENCE", 0.3)
    hanging = tmp_path / "g++"
    missing = tmp_path / "none"
    hanging.write_text("#!/bin/sh\nsleep 2 &\nwait\n")  # with a child that outlives it
    hanging.chmod(0o755)
    for path, reason in (
        (hanging, f"the C++ compiler {hanging} does not answer within 0.3 s"),
        (missing, f"no C++ compiler {missing} (No such file or directory)"),
    ):
        monkeypatch.setenv("CXX", str(path))
        assert compiler.compiler_error() == reason
