"""Numbers of flags: each one is either usable, or refused in one line that names the flag."""

import argparse
import time
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from nanochat import arguments, budget
from nanochat.errors import InputError
from nanochat.flags import build_parser
from nanochat.sweep.experiment import read_experiment

MODULES = [
    "nanochat.dataset",
    *(f"scripts.{path.stem}" for path in sorted((ROOT / "scripts").glob("[a-z]*.py"))),
    *(path.stem for path in sorted((ROOT / "dev/bench").glob("[a-z]*.py"))),
]
ODD = [
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e400",
    "-1e30",
    "1e-320",
    "1e-31",
    str(10**30),
    "9" * 5000,
    "-5",
    "-0.5",
    "-2",
    "0",
    "0.0",
    "-0",
    "-1",
    "-1.0",
    "1",
    "2",
    "0.5",
    "1.5",
    "1e3",
    "0x10",
    "١٢",
    "１２",
    "²",
    "1_000",
    " 5",
    "+5",
    "",
    " ",
    "many",
    "None",
    "1,5",
    str(2**63 - 1),
    str(2**63),
    str(2**31),
    "1e30",
    "1e29",
]


class Parsed(Exception):
    """Carries a script's parser out of its main()."""


@pytest.fixture(scope="module")
def parsers():
    """{module: the parser that its main() makes}."""

    def stop(self, *_):
        raise Parsed(self)

    parsers = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "dev/bench")
        patch.setattr(arguments.ArgumentParser, "parse_args", stop)
        for name in MODULES:
            with pytest.raises(Parsed) as e:
                import_module(name).main([])
            parsers[name] = e.value.args[0]
    return parsers


def numbers_of(parser):
    """(flag, argparse type) of the flags that have a type, other than a path."""
    return [
        (action.option_strings[0], action.type)
        for action in parser._actions
        if action.type not in (None, Path) and action.option_strings
    ]


def test_each_number_of_each_script_is_finite_or_refused(parsers):
    """No flag's type is plain int or float. A type returns finite numbers, or refuses in one short line."""
    for module, parser in parsers.items():
        for flag, parse in numbers_of(parser):
            assert parse not in (int, float), f"{module} {flag}"
            for text in ODD:
                try:
                    value = parse(text)
                except argparse.ArgumentTypeError as e:
                    assert "\n" not in str(e) and len(str(e)) < 300, f"{module} {flag} {text}"
                    continue
                for one in value if isinstance(value, list) else [value]:
                    largest = {int: 2**63 - 1, float: 1e30, str: one}[type(one)]
                    assert isinstance(one, str) or -1 <= one <= largest, f"{module} {flag} {text!r}: {one}"


OFF = [
    "--model-dim",
    "--n-kv-head",
    "--num-iterations",
    "--target-flops",
    "--target-param-data-ratio",
    "--total-batch-size",
    "--grad-clip",
    "--eval-every",
    "--sample-every",
    "--save-every",
    "--keep",
    "--core-metric-every",
    "--core-metric-max-per-task",
    "--vocab-size",
    "--stop-at-ppl",
]


@pytest.mark.parametrize("text", ["0", "-2", "-0.5", "nan"])
def test_minus_one_switches_off_and_nothing_else_below_one_step_does(text):
    for flag in OFF:
        assert getattr(build_parser().parse_args([flag, "-1"]), flag[2:].replace("-", "_")) == -1
        with pytest.raises(InputError, match=rf"{flag}: '{text}' is not a .*nor -1"):
            build_parser().parse_args([flag, text])


def test_every_number_that_base_train_takes_can_be_counted_with(base_dir, capsys):
    """--dry-run of one tiny layer with each flag at each odd value that its type allows."""
    from scripts import base_train

    for flag, parse in numbers_of(build_parser()):
        values = set()
        for text in ODD:
            try:
                value = str(parse(text))
            except argparse.ArgumentTypeError:
                continue
            if value in values:
                continue
            values.add(value)
            argv = [*TINY, "--depth", "1", "--vocab-size", "300", "--dry-run", f"{flag}={text}"]
            started = time.monotonic()
            if flag in ("--target-flops", "--target-param-data-ratio"):
                argv += ["--num-iterations", "-1"]
            try:
                base_train.main(argv)
            except InputError as e:
                assert "\n" not in str(e) and flag in str(e), f"{flag} {text}: {e}"
            assert time.monotonic() - started < 15, f"{flag} {text}"
    assert "training: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num-iterations", 0], "--num-iterations: '0' is not a whole number >= 1, nor -1"),
        (["--num-iterations", -1, "--target-flops", "nan"], "--target-flops: 'nan' is not a number above 0"),
        (
            ["--num-iterations", -1, "--target-param-data-ratio", "1e308"],
            "--target-param-data-ratio: '1e308' is not a number",
        ),
        (["--warmup-steps", 7], "--warmup-steps 7: more than the 6 steps of the run"),
        (["--matrix-lr", "-0.5"], "--matrix-lr: '-0.5' is not a number from 0"),
        (["--attn-rank", "9" * 400], "--attn-rank: '9999.*': give 0"),
        (["--resume", "²"], "--resume ²: use auto"),
        (["--budget-params", "²", "--solve", "rank"], "--budget-params ²: neither"),
        (
            ["--budget-params", 2**63 - 1, "--plan", "--depth", 4000],
            "--depth 4000: --plan goes through every depth",
        ),
        (
            ["--mlp-ratio", "1e20"],
            "--mlp-ratio.*: 2 layers of width 32, with MLPs of .* more than 1e.15 parameters",
        ),
        (["--model-dim", 2**20], "--model-dim.*need at least .* GiB, and there are"),
        (
            ["--device-batch-size", 2**30, "--total-batch-size", 2**35],
            "--device-batch-size: weights, gradients and activations need at least",
        ),
        (["--subspace", "basis", "--subspace-dim", 2**62], "--subspace-dim: weights"),
        (["--layer-map", "0,1,\n" + "9" * 5000], "--layer-map: "),
    ],
)
def test_what_has_no_meaning_or_no_place_is_refused_before_anything_is_written(
    train, base_dir, flags, message
):
    with pytest.raises(InputError, match=message) as e:
        train(*flags, tag="bad")
    assert "\n" not in str(e.value) and not (base_dir / "runs/bad").exists()


def test_a_budget_without_end_is_refused(train, monkeypatch):
    monkeypatch.setattr(budget, "DEEPEST", 40)
    with pytest.raises(InputError, match="--budget-params 9223.*: leaves room for more than 40 layers"):
        train("--budget-params", 2**63 - 1, "--solve", "depth")


def test_memory_that_is_not_there_is_one_line(command):
    """The script asks torch for 4 TiB."""
    code, _, stderr = command("dev/bench/hadamard.py", "--bits", 40, "--device-type", "cpu")
    assert code == 2 and stderr.count("\n") == 1 and stderr.startswith("error: out of memory (")


@pytest.mark.parametrize(
    "line, message",
    [
        ("grad-clip = inf", "--grad-clip: 'inf' is not a number"),
        ("grad-clip = nan", "--grad-clip: 'nan'"),
        ("depth = 1e3", "--depth: '1000.0' is not a whole number"),
        ("depth = 2026-11-20", "depth must be a number"),
        ("depth = [[1, 2]]", "depth must be a number"),
        ("depth = {a = 1}", "depth must be a number"),
        ("eval-every = 0", "--eval-every: '0'"),
        ("max-seq-len = 10000000000", "--max-seq-len: '10000000000' is not a whole number <="),
        (f"seeds = [{10**30}]", "seeds: give whole numbers >= 0, up to"),
        ("processes = 1000000000000", "processes: give whole numbers >= 1, up to 1024"),
        ("depth = " + "9" * 5000, "not TOML"),
        ("depth = " + "[" * 5000 + "]" * 5000, "not TOML"),
        ('window-pattern = "a\\u0000"', "window-pattern has a NUL"),
        ('window-pattern = "S\\nL"', "--window-pattern"),
    ],
)
def test_numbers_of_an_experiment_file(tmp_path, line, message):
    path = tmp_path / "e.toml"
    path.write_text(
        ("" if line.startswith("processes") else "seeds = [1]\n")
        + "[flags]\nvocab-size = 300\nnum-iterations = 6\n[points.a]\n"
        + line
    )
    if line.startswith("processes"):
        path.write_text(f"seeds = [1]\n{line}\n[flags]\nvocab-size = 300\nnum-iterations = 6\n")
    with pytest.raises(InputError, match=message) as e:
        read_experiment(path)
    assert "\n" not in str(e.value)
