"""Whatever standard output and error are or become, the work is done and its result is the exit code."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY
from processes import environment

from nanochat import console, metrics

SCRIPT = """
import sys
from nanochat.common import run_script
from nanochat.processes import print0
def main():
    for number in range(2000):
        print0("line", number, "→ \\u00e9 \\ud800")
        print("note", number, file=sys.stderr)
    open(sys.argv[1], "w").write("done")
run_script(main, *map(bool, sys.argv[2:]))
"""


def run(tmp_path, *arguments, shell="exec {}", **changes):
    """SCRIPT under a shell's redirections: (exit code, stdout, stderr, whether the work was done)."""
    code = shell.format('"$@"')
    done = subprocess.run(
        ["bash", "-c", code, "bash", sys.executable, "-c", SCRIPT, str(tmp_path / "work"), *arguments],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        env=environment(**changes),
    )
    return (
        done.returncode,
        done.stdout.decode(errors="replace"),
        done.stderr.decode(),
        (tmp_path / "work").exists(),
    )


@pytest.mark.parametrize(
    "shell",
    [
        "exec {} >&- 2>&-",
        "exec {} <&- >&-",
        "exec {} > /dev/full 2>&1",
        "{} | head -n 1; exit ${{PIPESTATUS[0]}}",
        "{} 2>&1 | true; exit ${{PIPESTATUS[0]}}",
    ],
    ids=["closed", "closed too", "full disk", "head", "nobody reads"],
)
def test_streams_that_take_nothing_stop_nothing(tmp_path, shell):
    code, _, stderr, worked = run(tmp_path, shell=shell)
    assert code == 0 and worked and "Error" not in stderr and "Exception" not in stderr


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1"])
def test_what_the_terminal_has_no_character_for_is_spelt_out(tmp_path, encoding):
    code, stdout, _, worked = run(tmp_path, PYTHONIOENCODING=encoding)
    assert code == 0 and worked and r"line 1999 \u2192 " in stdout and r"\ud800" in stdout


def test_what_is_printed_commands_no_terminal_but_ours(tmp_path):
    with open(tmp_path / "out", "w") as file:
        stream = console.lossy(file)
        print("\x1b[31mred\x1b[0m \x1b[2J\x1b]0;title\x07 \x9b5n\x08\x7f tab\t é", file=stream)
        stream.write("\n\x1b[A")  # a progress bar
        stream.command("\x1b[J")
        stream.flush()
    spelt_out = r"red \x1b[2J\x1b]0;title\x07 \x9b5n\x08\x7f"
    assert (tmp_path / "out").read_text() == f"{spelt_out} tab\t é\n\n\x1b[A\x1b[J"


def test_a_full_disk_is_said_once_where_it_can_be(tmp_path):
    code, _, stderr, _ = run(tmp_path, shell="exec {} > /dev/full")
    assert code == 0 and [line for line in stderr.splitlines() if not line.startswith("note")] == [
        "standard output: No space left on device; the work goes on, what it prints is lost"
    ]


def test_a_script_that_is_there_for_what_it_prints_ends_with_its_reader_and_reports_a_full_disk(tmp_path):
    code, stdout, stderr, worked = run(
        tmp_path, "result", shell="{} 2> /dev/null | head -n 1; exit ${{PIPESTATUS[0]}}"
    )
    assert (code, stdout, stderr, worked) == (141, "line 0 → é \\ud800\n", "", False)
    code, _, stderr, worked = run(tmp_path, "result", shell="exec {} > /dev/full")
    assert code == 2 and not worked
    assert stderr.splitlines()[-1].startswith("error: file system: No space left on device")


def test_a_closed_stream_does_not_give_its_number_to_the_next_file(tmp_path):
    code = (
        "from nanochat.common import run_script\nimport os\n"
        f"def main():\n    f = open('{tmp_path / 'work'}', 'w')\n"
        "    os.write(1, b'of a library')\n    f.write('work')\n    f.close()\nrun_script(main)"
    )
    command = ["bash", "-c", '"$@" >&-', "bash", sys.executable, "-c", code]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / "work").read_text() == "work"


def test_a_training_ends_well_though_nobody_reads_it_and_no_character_can_be_shown(base_dir, corpus_dir):
    flags = ["--data", str(corpus_dir), "--sample-every", "3", "--model-tag", "mute"]
    command = [sys.executable, "-m", "scripts.base_train", *TINY, *flags]
    shell = '"$@" 2>&1 | head -n 1; exit ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", shell, "bash", *command],
        cwd=ROOT,
        capture_output=True,
        env=environment(PYTHONIOENCODING="ascii"),
    )
    assert (done.returncode, done.stderr) == (0, b"")
    run = metrics.load_run(metrics.runs_dir() / "mute")
    assert run.summary["status"] == "finished" and "⟶" in run.history[-1]["sample"][0]
    assert os.listdir(metrics.runs_dir() / "mute/checkpoints") == ["step_000006"]
