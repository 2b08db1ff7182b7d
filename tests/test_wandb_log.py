"""Runs on W&B, sent by its real client to a stand-in server: what comes there; trouble stops no run."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path  # noqa: F401  for the code that a test starts

import pytest
from conftest import ROOT
from processes import wait_for
from wandb_server import serving

from nanochat import metrics, wandb_log, wandb_worker
from nanochat.metrics import RunRecord

INIT = 2  # seconds
FINISH = 2
MARGIN = 3


def row(step):
    return {
        "step": step,
        "total_tokens": 100 * step,
        "total_training_time": 2.0 * step,
        "total_training_flops": 1e6 * step,
        "train/loss": 9.0 / step,
        "sample": ["the cat"],
    }


def has_no_wandb_core(pid: int) -> bool:
    """Whether the process that wandb starts beside this one has ended."""
    return subprocess.run(["pgrep", "-f", f"wandb-core .*--pid {pid}"]).returncode == 1


@pytest.fixture
def server(monkeypatch):
    """A server to which this user is logged in, and nothing else of W&B's set-up."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with serving() as server:
        given = {
            "BASE_URL": server.url,
            "API_KEY": "0" * 40,
            "PROJECT": "proj",
            "INIT_TIMEOUT": INIT,
            "FINISH_TIMEOUT": FINISH,
        }
        for name, value in given.items():
            monkeypatch.setenv(f"WANDB_{name}", str(value))
        yield server


@pytest.fixture
def workers(monkeypatch):
    """The processes that were started to talk to W&B."""
    started = []
    popen = subprocess.Popen

    def start(command, **options):
        process = popen(command, **options)
        if "nanochat.wandb_worker" in command:
            started.append(process)
        return process

    monkeypatch.setattr(wandb_log.subprocess, "Popen", start)
    return started


def begin(folder, resumed_step=0) -> RunRecord:
    record = RunRecord(folder, {"flags": {"depth": 2}}, {"params/total": 7}, "my run", [], resumed_step)
    record.summarize("running")
    return record


def steps(server) -> list[int]:
    """Of the one run that the server has, in the order of its history."""
    (run,) = server.runs.values()
    return [json.loads(line)["step"] for line in run["history"]]


def sync(folder, server):
    """`wandb sync` of all offline folders of a run."""
    folders = sorted(map(str, (folder / "wandb").glob("offline-run-*")))
    done = subprocess.run([sys.executable, "-m", "wandb", "sync", *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folders


# ---- what comes to W&B -------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_as_the_same_run_and_sends_what_a_killed_one_could_not(server, tmp_path, capfd):
    record = begin(tmp_path)
    for step in (1, 2, 3):
        record.log(row(step))
    record.summarize("stopped")
    record.close()
    ((identity, run),) = server.runs.items()
    assert run["state"] == "failed" and run["preempting"]  # which W&B shows as preempted
    assert json.loads(run["summaryMetrics"])["status"] == "stopped"
    with open(tmp_path / "metrics.jsonl", "a") as f:  # resumed; then the machine went down with nothing sent
        f.write("".join(json.dumps(row(step)) + "\n" for step in (4, 5, 6)) + '{"step": 7, "total_tok')
    resumed = begin(tmp_path, resumed_step=5)
    for step in (6, 7):
        resumed.log(row(step))
    resumed.summarize("finished")
    resumed.close()
    assert list(server.runs) == [identity] == [(tmp_path / "wandb_id.txt").read_text().strip()]
    assert run["state"] == "finished" and json.loads(run["summaryMetrics"])["status"] == "finished"
    assert steps(server) == [row["step"] for row in metrics.read_history(tmp_path)] == list(range(1, 8))
    config = json.loads(run["config"])
    assert run["displayName"] == "my run" and config["tag"]["value"] == tmp_path.name
    assert config["accounting"]["value"] == {"params/total": 7} and config["flags"]["value"] == {"depth": 2}
    assert capfd.readouterr().err == f"wandb: {server.url}/lab/proj/runs/{identity}\n" * 2


def test_a_run_of_an_earlier_version_goes_on_where_its_own_count_ended(server, tmp_path):
    """It let W&B count the rows: 0, 1, 2, … As it had been killed once, W&B's count was ahead of the step."""
    (tmp_path / "wandb_id.txt").write_text("old\n")
    history = [json.dumps({"_step": i, **row(step)}) for i, step in enumerate((1, 2, 3, 3, 4))]
    server.runs["old"] = {
        "displayName": "my run",
        "group": None,
        "state": "failed",
        "config": "{}",
        "history": history,
        "summaryMetrics": json.dumps({"_step": 4, **row(4)}),
    }
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row(step)) + "\n" for step in range(1, 6)))
    record = begin(tmp_path, resumed_step=5)
    record.log(row(6))
    record.summarize("finished")
    record.close()
    assert steps(server) == [1, 2, 3, 3, 4, 5, 6]


def test_the_offline_folders_of_a_run_make_its_whole_history(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resumed_step in (0, 2):
        record = begin(tmp_path, resumed_step)
        record.log(row(resumed_step + 1))
        record.log(row(resumed_step + 2))
        record.summarize("stopped" if resumed_step == 0 else "finished")
        record.close()
    assert not server.runs
    advice = f"wandb: send it later with: wandb sync {tmp_path}/wandb/offline-run-*\n"
    assert capfd.readouterr().err == advice * 2
    monkeypatch.delenv("WANDB_MODE")
    sync(tmp_path, server)
    ((identity, run),) = server.runs.items()
    assert identity == (tmp_path / "wandb_id.txt").read_text().strip()
    assert run["state"] == "finished" and steps(server) == [1, 2, 3, 4]
    assert [json.loads(line)["_step"] for line in run["history"]] == [1, 2, 3, 4]


def test_a_run_that_ends_by_an_error_is_shown_as_failed_and_can_go_on(server, tmp_path):
    code = (
        "import test_wandb_log as t\n"
        "from nanochat.common import run_script\n"
        "from nanochat.errors import InputError\n"
        "def main():\n"
        "    record = t.begin(t.Path('run').absolute())\n"
        "    record.log(t.row(1))\n"
        "    record.summarize('running')\n"
        "    record.log(t.row(2))\n"
        "    raise InputError('not finite')\n"
        "run_script(main)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "error: not finite\n" in done.stderr and "Traceback" not in done.stderr
    (run,) = server.runs.values()
    assert run["state"] == json.loads(run["summaryMetrics"])["status"] == "failed" and steps(server) == [1, 2]
    resumed = begin(tmp_path / "run", resumed_step=1)
    for step in (2, 3):
        resumed.log(row(step))
    resumed.summarize("finished")
    resumed.close()
    assert steps(server) == [1, 2, 3] and run["state"] == "finished"


# ---- trouble -----------------------------------------------------------------------------------------------

HANGING = "import time\nwhile True:\n    time.sleep(1)\n"


@pytest.mark.parametrize(
    "trouble, message",
    [
        ({"start": {"answering": False}}, "no answer|Failed to get"),
        ({"start": {"status": 500}}, "no answer|HTTP 500"),
        # which of the two gives up first is a matter of milliseconds
        (
            {"middle": {"answering": False}},
            f"no answer from W&B within {FINISH} s|Fatal error while uploading",
        ),
        ({"middle": {"stream_status": 404}}, "Fatal error while uploading data"),
        ({"middle": {}, "kill": True}, "its process ended with code -9"),
        ({"environment": {"WANDB_MODE": "bogus"}}, "settings: mode Input should be 'online'"),
        ({"wandb": "raise ImportError('no wandb for this Python')\n"}, "no wandb for this Python"),
        ({"wandb": HANGING}, f"no answer from W&B within {INIT + MARGIN} s"),
    ],
    ids=["silent", "HTTP 500", "gone", "deleted", "killed", "bogus mode", "not importable", "hanging"],
)
def test_trouble_is_one_line_and_neither_stops_nor_stalls_the_run(
    trouble, message, server, workers, tmp_path, monkeypatch, capfd
):
    offline = "wandb" not in trouble  # whether wandb can write the run offline
    monkeypatch.setattr(wandb_log, "OFFLINE_TIMEOUT", 30 if offline else 1)
    monkeypatch.setattr(wandb_log, "TIMEOUT_MARGIN", MARGIN)
    server.behave(**trouble.get("start", {}))
    for name, value in trouble.get("environment", {}).items():
        monkeypatch.setenv(name, value)
    if "wandb" in trouble:
        (tmp_path / "path").mkdir()
        (tmp_path / "path" / "wandb.py").write_text(trouble["wandb"])
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    start_time = time.monotonic()
    record = begin(tmp_path / "run")
    record.log(row(1))
    assert time.monotonic() - start_time < 0.5
    if "middle" in trouble:
        wait_for(lambda: server.runs, 30)
        server.behave(**trouble["middle"])
    if "kill" in trouble:
        os.killpg(workers[0].pid, signal.SIGKILL)
    record.log(row(2))
    record.summarize("finished")
    start_time = time.monotonic()
    record.close()
    assert time.monotonic() - start_time < INIT + FINISH + 15
    usual = f"{server.url}/lab|sending what is left"
    lines = [line for line in capfd.readouterr().err.splitlines() if not re.search(usual, line)]
    assert len(lines) == 1 and re.match(f"wandb: [^;]*({message})", lines[0])
    assert ("wandb sync" if offline else "metrics.jsonl has everything") in lines[0]
    assert bool(list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))) == offline
    assert metrics.load_run(tmp_path / "run").summary["status"] == "finished"
    if "stream_status" in trouble.get("middle", {}):
        server.behave()
        sync(tmp_path / "run", server)
        assert steps(server) == [1, 2], "what W&B did not take is in the offline folder"
    for worker in workers:
        assert worker.poll() is not None
        wait_for(functools.partial(has_no_wandb_core, worker.pid), 5)


# ---- the id that makes a resumed run the same line ---------------------------------------------------------

SEEN_BY_INIT = """
import os, pathlib, signal
def init(id, dir, **settings):
    kept = (pathlib.Path(dir) / "wandb_id.txt").read_text()
    pathlib.Path(dir, "seen.txt").write_text(f"{id} {kept}")
    os.kill(os.getpid(), signal.SIGKILL)
def Settings(**settings):
    return settings
"""


def test_a_kill_when_the_run_is_created_does_not_split_its_line(server, tmp_path, monkeypatch):
    """wandb.init dies as it begins: the id that it was given is in the run folder. The resumed run has it.
    First it is a run of a W&B sweep's agent, which chooses the id; then the user resumes it.
    """
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_SWEEP_ID", "abc123")
        patch.setenv("WANDB_RUN_ID", "run42")
        (tmp_path / "path").mkdir()
        (tmp_path / "path/wandb.py").write_text(SEEN_BY_INIT)
        patch.setenv("PYTHONPATH", str(tmp_path / "path"))
        record = begin(tmp_path / "run")
        record.log(row(1))
        record.close()
        assert (tmp_path / "run/seen.txt").read_text() == "run42 run42\n"
    resumed = begin(tmp_path / "run", resumed_step=1)
    resumed.log(row(2))
    resumed.summarize("finished")
    resumed.close()
    assert list(server.runs) == ["run42"] and steps(server) == [1, 2]


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, b"a/../b", b"x" * 10_000, b"\xff\xfe", "é".encode(), b"--x y"]
)
def test_a_damaged_id_is_taken_from_what_was_sent_or_said_to_be_lost(tmp_path, capsys, content):
    (tmp_path / "wandb_id.txt").write_bytes(content)
    new = wandb_log.run_id({}, tmp_path)
    assert re.fullmatch("[0-9a-f]{8}", new)
    message = f"{tmp_path}/wandb_id.txt: damaged; the run begins a new line on the dashboard, {new}"
    assert capsys.readouterr().err == f"wandb: {message}\n"
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/sent.json").write_text('{"id": "first", "step": 3}')
    assert wandb_log.run_id({}, tmp_path) == "first"
    for damaged in (
        '{"id": ["first"], "step": 3}',
        '{"id": "first", "step": "3"}',
        "[]",
        "{",
        '{"id": "../x", "step": 1}',
    ):
        (tmp_path / "wandb/sent.json").write_text(damaged)
        assert re.fullmatch("[0-9a-f]{8}", wandb_log.run_id({}, tmp_path))


def test_rows_of_a_damaged_record_do_not_reach_the_worker(tmp_path):
    lines = [
        b'{"step": 1, "train/loss": null}',
        b"[" * 10_000,
        b'{"step": "2"}',
        b'{"step": 3, "val/ppl": "x"}',
        b'{"step": 2, "sample": ["a"]}',
        b'{"step": 9}',
        b'{"step": 4}',
        b'{"step": 5, "tra',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "summary.json").write_text("[1]")
    offset = sum(len(line) + 1 for line in lines[:6])
    record = wandb_worker.Record({"folder": str(tmp_path), "offset": offset, "resumed_step": 3})
    assert [new_row["step"] for new_row in record.new_rows()] == [1, 2, 4]
    assert not list(record.new_rows()) and record.new_summary() == {}
    logged = []
    run = types.SimpleNamespace(write_logs=logged.append)
    wandb_worker.write_logs(run, {"step": 1, "train/loss": None, "val/ppl": 2.0})
    assert logged == ["step 1 | val/ppl 2.0000"]
