"""The two commands as a newcomer calls them, at a size of seconds."""
import os
import subprocess

import pytest

from conftest import ROOT

SMALL = dict(VOCAB_SIZE="300", DEPTH="2", MODEL_DIM="32", HEAD_DIM="16", MAX_SEQ_LEN="32", ATTN_RANK="8", MLP_RANK="0.25",
             DEVICE_BATCH_SIZE="4", TOTAL_BATCH_SIZE="256", NUM_ITERATIONS="6", EVAL_EVERY="3", EVAL_TOKENS="512", SAVE_EVERY="3",
             PPL_THRESHOLDS="250,10", NPROC="1")


def speedrun(tmp_path, corpus_dir, **changes):
    env = {**os.environ, **SMALL, "DATA": str(corpus_dir), "NANOCHAT_BASE_DIR": str(tmp_path), **changes}
    return subprocess.run(["bash", "speedrun.sh"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="made by dev/test.sh")
def test_speedrun_leaves_a_report_and_repeats_nothing(tmp_path, corpus_dir):
    first = speedrun(tmp_path, corpus_dir)
    assert first.returncode == 0, first.stderr[-3000:]
    out = tmp_path / "report"
    for name in ("report.md", "report.html", "report.csv", "loss.png", "parameters.png", "memory.png", "perplexity.png"):
        assert (out / name).stat().st_size > 500, name
    assert "validation perplexity" in first.stdout and "_full" in first.stdout and "_attn8_mlp0.25" in first.stdout
    assert len(list((tmp_path / "runs").iterdir())) == 2
    metrics = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/metrics.jsonl")}
    second = speedrun(tmp_path, corpus_dir)
    assert second.returncode == 0 and second.stdout.count("already finished") == 2 and "already trained" in second.stdout
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/metrics.jsonl")} == metrics


@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="made by dev/test.sh")
def test_speedrun_stops_at_a_bad_setting_with_its_line(tmp_path, corpus_dir):
    done = speedrun(tmp_path, corpus_dir, DATA="nonesuch")
    assert done.returncode == 2 and done.stderr.strip().startswith("error: --data nonesuch")
