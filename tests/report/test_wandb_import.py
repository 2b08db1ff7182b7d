"""Runs read by W&B's real client from a stand-in server on this machine: recorded answers, and a round trip.

data/wandb.json holds what the client of wandb 0.31 sent while scripts.base_train made two tiny runs (host and
paths taken out), and what their folders held.
"""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_server import serving

from nanochat.errors import InputError
from nanochat.metrics import RunRecord, load_run
from nanochat.report.wandb_import import runs_from_wandb
from scripts import report

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "wandb.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def one_server():
    """One for all tests: wandb keeps one address for the life of a process. It forgets it afterwards."""
    import wandb  # slow to import

    with serving() as server, pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_BASE_URL", server.url)
        wandb.teardown()
        yield server
        wandb.teardown()


@pytest.fixture
def environment(one_server, monkeypatch, tmp_path):
    """Nothing of the user's own W&B set-up, and no long waiting for a server that is not there."""
    for name in ("ENTITY", "PROJECT", "RUN_GROUP", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    settings = {"API_KEY": "0" * 40, "SILENT": "true", "MODE": "online", "CONSOLE": "off"}
    for name, value in (settings | {"DIR": str(tmp_path)}).items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    import wandb

    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 1)
    return monkeypatch


@pytest.fixture
def server(one_server, environment):
    """The recorded project; its runs may be changed."""
    one_server.runs = copy.deepcopy(RECORDED["server"])
    one_server.status = 200
    return one_server


def edit(run: dict, field: str, **changes):
    """Change a run as the server keeps it; None removes."""
    content = {**json.loads(run[field]), **changes}
    run[field] = json.dumps({key: value for key, value in content.items() if value is not None})


def without_samples(history):
    rows = copy.deepcopy(history)
    for row in rows:
        row.pop("sample", None)
    return rows


@pytest.mark.parametrize("spec", ["lab/proj", "lab/proj/pairs"])
def test_a_run_reads_the_same_from_wandb_and_from_its_folder(server, spec):
    runs = runs_from_wandb(spec)
    assert [run.name for run in runs] == ["full", "low"]
    for run in runs:
        folder = RECORDED["folders"][run.name]
        assert run.config == folder["config"]
        assert run.summary == folder["summary"] and run.summary["status"] == "finished"
        assert run.summary["time_to_ppl/295.5/step"] == 3
        assert run.history == without_samples(folder["history"]) and len(run.history) == 6


def test_what_a_run_sends_comes_back(server, environment, tmp_path):
    environment.setenv("WANDB_ENTITY", "lab")
    environment.setenv("WANDB_PROJECT", "proj")
    environment.setenv("WANDB_RUN_GROUP", "new")
    import wandb

    wandb.teardown()  # it reads the group once
    config = {
        "flags": {"model_tag": "mine", "ppl_thresholds": [62.5]},
        "seed": 1,
        "derived": {"num_iterations": 3, "model": {"attn_ranks": [8, 4]}},
    }
    folder = tmp_path / "mine"
    record = RunRecord(folder, config, {"params/total": 7}, "a name", [62.5])
    for step, loss, ppl in ((1, 5.0, 100.0), (2, math.inf, None), (3, 4.0, 50.0)):
        record.log(
            {
                "step": step,
                "total_tokens": 10 * step,
                "total_training_time": 0.5 * step,
                "total_training_flops": 10**15 * step,
                "train/loss": loss,
                **({"val/ppl": ppl} if ppl else {}),
            }
        )
    record.summarize("finished")
    record.close()
    [run] = runs_from_wandb("lab/proj/new")
    here = load_run(folder)
    assert (run.name, run.config, run.summary) == (here.name, here.config, here.summary)
    assert run.history == here.history and run.history[1]["train/loss"] == math.inf
    assert run.summary["time_to_ppl/62.5/step"] == 3


def test_what_the_server_may_do_to_numbers_and_names_is_undone(server):
    full, low = server.runs.values()
    edit(full, "summaryMetrics", **{"val/ppl": "NaN", "mem/peak_bytes": None})
    edit(full, "summaryMetrics", **{"time_to_ppl/295.5/step": None, "time_to_ppl/295": {"5/step": 3}})
    low["history"][2] = low["history"][2].replace('"train/loss":', '"train/loss":NaN,"x":')
    resumed = {"_step": 6, "_timestamp": 1.0, "step": 6, "train/loss": 1.5, "train/mfu": None}
    low["history"] += [json.dumps(resumed), json.dumps({"_step": 7, "gpu": 1})]
    one, two = runs_from_wandb("lab/proj")
    assert math.isnan(one.summary["val/ppl"]) and "mem/peak_bytes" not in one.summary
    assert one.summary["time_to_ppl/295.5/step"] == 3
    assert math.isnan(two.history[2]["train/loss"]) and len(two.history) == 6
    last = two.history[5]
    assert last["train/loss"] == 1.5 and last["val/ppl"] > 1 and "train/mfu" not in last
    for row in (one.summary, *one.history, two.summary, *two.history):
        assert not any(key.startswith("_") for key in row)


@pytest.mark.parametrize(
    "state, step, status",
    [
        ("finished", 6, "finished"),
        ("finished", 4, "stopped"),
        ("running", 4, "running"),
        ("crashed", 6, "running"),
        ("failed", 4, "running"),
    ],
)
def test_status(server, state, step, status):
    full, _ = server.runs.values()
    full["state"] = state
    edit(full, "summaryMetrics", step=step)
    assert runs_from_wandb("lab/proj")[0].summary["status"] == status


def test_a_run_that_stopped_early_at_its_perplexity_is_finished(server):
    full, _ = server.runs.values()
    edit(full, "summaryMetrics", step=3, **{"val/ppl": 19.0})
    flags = json.loads(full["config"])["flags"]["value"]
    edit(full, "config", flags={"value": {**flags, "stop_at_ppl": 20.0}})
    assert runs_from_wandb("lab/proj")[0].summary["status"] == "finished"


def test_equal_names_foreign_runs_and_runs_that_have_not_begun(server, capsys):
    full, low = server.runs.values()
    server.runs["again"] = copy.deepcopy(full)
    config = json.dumps({"lr": {"value": 1}})
    server.runs["foreign"] = {**copy.deepcopy(full), "displayName": "a GAN", "config": config}
    flags = json.loads(low["config"])["flags"]["value"]
    server.runs["new"] = {**copy.deepcopy(low), "history": [], "state": "running", "summaryMetrics": "{}"}
    edit(server.runs["new"], "config", flags={"value": {**flags, "model_tag": None}})
    runs = runs_from_wandb("lab/proj")
    first = next(iter(server.runs))
    assert [run.name for run in runs] == [f"full ({first})", "low", "full (again)", "low on the dashboard"]
    assert runs[3].history == [] and runs[3].summary["status"] == "running"
    assert runs[3].summary["params/total"] > 0  # from the accounting
    assert capsys.readouterr().err == "left out, not made by scripts.base_train: a GAN\n"


def test_more_runs_than_a_page_holds(server):
    full, _ = server.runs.values()
    for i in range(60):
        server.runs[f"id{i}"] = {**full, "history": [], "group": "many"}
    assert len(runs_from_wandb("lab/proj/many")) == 60


def refused(spec) -> str:
    with pytest.raises(InputError) as error:
        runs_from_wandb(spec)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"--from-wandb {spec}: ")
    return str(error.value).removeprefix(f"--from-wandb {spec}: ")


@pytest.mark.parametrize("spec", ["", "proj", "lab/", "/proj", "lab//group", "lab/proj/", " /proj"])
def test_bad_spec(spec):
    assert refused(spec) == "give ENTITY/PROJECT or ENTITY/PROJECT/GROUP"


def test_no_such_project_group_or_run(server):
    assert refused("lab/other") == f"no such project on {server.url}, or none that you may read"
    assert refused("lab/proj/other") == "no run in the group other; groups there: pairs"
    for run in server.runs.values():
        edit(run, "config", flags=None)
    assert refused("lab/proj") == "none of its 2 runs was made by scripts.base_train"
    server.runs.clear()
    assert refused("lab/proj") == "none of its 0 runs was made by scripts.base_train"


def test_not_logged_in_is_one_line_and_exit_code_2(server, environment, tmp_path):
    environment.delenv("WANDB_API_KEY")
    environment.setenv("HOME", str(tmp_path))
    environment.setenv("NETRC", str(tmp_path / "none"))
    code = (
        "from nanochat.common import run_script; from nanochat.report.wandb_import import runs_from_wandb\n"
        "run_script(lambda: runs_from_wandb('lab/proj'))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    remedy = "run `wandb login`, or set WANDB_API_KEY"
    assert done.returncode == 2
    assert done.stderr == f"error: --from-wandb lab/proj: not logged in to W&B; {remedy}\n"


def test_refused_key_and_no_network(server, environment):
    server.status = 401
    assert "does not accept the API key (HTTP 401)" in refused("lab/proj")
    environment.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    words = "no answer from W&B (Failed to verify credentials with http://127.0.0.1:9"
    assert refused("lab/proj").startswith(words)


@pytest.mark.parametrize(
    "question, status, words",
    [("runs(filters", 500, "no answer from W&B"), ("historyKeys }", 404, "W&B says: returned error 404")],
)
def test_a_server_that_fails_on_the_way(server, environment, question, status, words):
    answer = server.answer

    def failing(operation, query, given):
        if question in query:
            server.status = status
        return answer(operation, query, given)

    environment.setattr(server, "answer", failing)
    assert refused("lab/proj").startswith(words)


def test_odd_values_on_wandb_are_left_out_or_refused_in_a_line(server, capsys):
    low = server.runs[sorted(server.runs)[-1]]
    odd_steps = [{"step": step} for step in ("7", [1], -1, True)]
    odd_values = [{"step": 7, "val/ppl": {"a": 1}}, {"step": 7, "total_tokens": "x"}]
    for i, row in enumerate(odd_steps + odd_values):
        low["history"].append(json.dumps({"_step": 7 + i, **row}))
    whole = copy.deepcopy(low)
    runs = runs_from_wandb("lab/proj")
    assert "on W&B: 6 rows left out, no rows of metrics; the first has step: '7'" in capsys.readouterr().err
    for run in runs:
        assert [row["step"] for row in run.history] == list(range(1, 7))
    for field, key, odd in [
        ("config", "tag", ["x"]),
        ("config", "accounting", [1]),
        ("summaryMetrics", "status", ["finished"]),
        ("summaryMetrics", "step", "6"),
        ("summaryMetrics", "val/ppl", [1]),
        ("summaryMetrics", "params/total", "many"),
        ("config", "device", "cpu"),
        ("config", "seed", {"a": 1}),
    ]:
        low |= copy.deepcopy(whole)
        edit(low, field, **{key: {"value": odd} if field == "config" else odd})
        try:
            report.load_runs([], "lab/proj")
        except InputError as e:
            assert "\n" not in str(e)
