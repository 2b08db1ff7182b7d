"""The run record: thresholds by hand, merging after a resume."""

import json
import math
from types import SimpleNamespace

import pytest

from nanochat.errors import InputError
from nanochat.metrics import RunRecord, load_run, read_history, time_to_ppl
from nanochat.step_metrics import StepResult, step_entry


def evaluation(step, ppl):
    return {
        "step": step,
        "total_tokens": 100 * step,
        "total_training_time": 2.0 * step,
        "total_training_flops": 1e6 * step,
        "val/ppl": ppl,
    }


def test_time_to_a_threshold_by_hand():
    evals = [evaluation(10, 400.0), evaluation(20, 100.0), evaluation(30, 25.0), evaluation(40, 30.0)]
    times = time_to_ppl(evals, [500.0, 100.0, 50.0, 30.0, 10.0])
    expected = {
        "500/step": 10,
        "100/step": 20,
        "100/step_interpolated": 20,
        "50/step": 30,
        "50/step_interpolated": 25,  # √(100·25) = 50
        "50/seconds": 60,
        "50/seconds_interpolated": 50,
        "50/tokens": 3000,
        "50/flops_interpolated": 25e6,
        "30/tokens_interpolated": 2000 + 1000 * math.log(100 / 30) / math.log(4),
    }
    for key, value in expected.items():
        assert times[f"time_to_ppl/{key}"] == pytest.approx(value)
    assert "time_to_ppl/500/step_interpolated" not in times and not any("/10/" in key for key in times)
    odd = [{"step": 5, "val/ppl": 20.0}, evaluation(6, None), evaluation(7, -1.0)]  # of a damaged file
    assert time_to_ppl([*odd, *evals], [50.0]) == time_to_ppl(evals, [50.0])


def test_history_after_a_kill_and_a_resume_is_that_of_one_run(tmp_path):
    lines = [{"step": 1, "a": 1}, {"step": 2, "a": 2, "val/ppl": 9}, {"step": 3, "a": 33}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "a'  # killed while writing
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 3, "a": 3}\n{"step": 4, "a": 4}\n')
    assert read_history(tmp_path) == [
        {"step": 1, "a": 1},
        {"step": 2, "a": 2, "val/ppl": 9},
        {"step": 3, "a": 3},
        {"step": 4, "a": 4},
    ]


def test_resumed_record_remembers_the_evaluations_before_its_checkpoint_only(tmp_path):
    record = RunRecord(tmp_path, {"flags": {}}, {"params/total": 7}, "dummy", [100.0])
    for entry in (evaluation(10, 200.0), evaluation(20, 90.0), evaluation(30, 80.0)):
        record.log(entry)
    record.close()
    resumed = RunRecord(tmp_path, {"flags": {}}, {"params/total": 7}, "dummy", [100.0], resumed_step=10)
    resumed.log(evaluation(20, 110.0))
    resumed.log(evaluation(30, 95.0))
    resumed.summarize("finished")
    resumed.close()
    run = load_run(tmp_path)
    assert run.summary["time_to_ppl/100/step"] == 30 and run.summary["status"] == "finished"
    assert run.summary["params/total"] == 7 and run.summary["val/ppl"] == 95.0
    assert [entry["val/ppl"] for entry in run.history] == [200.0, 110.0, 95.0]


def test_folders_that_are_no_runs_are_refused_in_a_line(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        load_run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: not a run's config.json"):
        load_run(tmp_path)


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 PCIe", 756e12), ("AMD EPYC 9654", None)])
def test_a_step_says_how_well_it_uses_the_gpus(name, peak):
    costs = {"flops/per_token": 3e9, "flops/executed_per_token": 4e9}
    run = SimpleNamespace(
        config={"device": {"name": name}},
        plan={"total_batch_size": 500_000},
        rows_per_step=1,
        spec=SimpleNamespace(accounting=costs),
        text=SimpleNamespace(train_rows=SimpleNamespace(count=1)),
        world=SimpleNamespace(size=2),
    )
    state = SimpleNamespace(step=1, seconds=2.0)
    entry = step_entry(run, state, StepResult(loss=1.0, grad_norm=1.0, lrm=1.0, seconds=2.0))
    if peak is None:
        assert "train/mfu" not in entry and "train/hfu" not in entry
    else:
        assert entry["train/mfu"] == pytest.approx(250_000 * 3e9 / (2 * peak))
        assert entry["train/hfu"] == pytest.approx(250_000 * 4e9 / (2 * peak))
    assert entry["total_training_flops"] == 500_000 * 3e9
