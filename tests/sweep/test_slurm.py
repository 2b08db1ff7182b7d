"""A sweep on Slurm: what is submitted, what a task does with signals and exit codes.

Opt-in (-m slurm): whole sweeps on a real cluster.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from nanochat import metrics
from nanochat.errors import InputError
from nanochat.signals import ENDING, REQUEUE, signal_name
from nanochat.sweep import slurm
from scripts import sweep

EXPERIMENT = """
seeds = [1]
[flags]
vocab-size = 300
depth = 2
model-dim = 32
head-dim = 16
max-seq-len = 32
device-batch-size = 4
total-batch-size = 256
num-iterations = {steps}
eval-every = {steps}
eval-tokens = 1024
sample-every = -1
[points.full]
[points.low]
attn-rank = 4
[points.lower]
attn-rank = 2
"""
# a job that takes the node, and gives it back after two seconds
URGENT_JOB = [
    "--job-name=question",
    "--partition=urgent",
    "--exclusive",
    "--output=/dev/null",
    "--wrap=sleep 2",
]
TAGS = ["question_full_s1", "question_low_s1", "question_lower_s1"]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base directory whose name has a space, as some have."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "my base"))
    return tmp_path / "my base"


@pytest.fixture
def submit(base, tmp_path, monkeypatch):
    """submit('--flag', …) -> the batch script for sbatch; submit.calls(): the calls of Slurm's commands.

    Slurm's commands are stand-ins that write down their arguments and print the file <name>.says.
    """
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in ("sbatch", "squeue", "scontrol"):
        (bin_dir / name).write_text(
            f'#!/usr/bin/env bash\necho {name} "$@" >> {bin_dir}/calls\n'
            f"cat {bin_dir}/{name}.says 2>/dev/null\n"
            f"if [ -f {bin_dir}/{name}.fails ]; then cat {bin_dir}/{name}.fails >&2; exit 1; fi\n"
        )
        (bin_dir / name).chmod(0o755)
    (bin_dir / "sbatch.says").write_text("71\n")
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    (tmp_path / "question.toml").write_text(EXPERIMENT.format(steps=6))

    def run(*flags):
        args = sweep.build_parser().parse_args(
            [str(tmp_path / "question.toml"), "--data", "stdlib", "--launcher", "slurm", *flags]
        )
        slurm.submit(sweep.load(args), args)
        return (base / "sweeps" / "question" / "slurm.sh").read_text()

    run.bin = bin_dir
    run.calls = lambda: (bin_dir / "calls").read_text().splitlines()
    return run


def finish(base, tag):
    folder = base / "runs" / tag
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"flags": {}}')
    (folder / "summary.json").write_text('{"status": "finished"}')


def options(script):
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


# ---- what is submitted -------------------------------------------------------------------------------------


def test_one_task_a_run_and_then_the_report(submit, base, capsys):
    script = submit("-j", "2", "--run", "try", '--sbatch=--partition=gpu --comment="a b" --gpus-per-task=1')
    assert all(f"\n  {tag}\n" in script for tag in TAGS)
    assert options(script) == [
        '--job-name="question"',
        f'--output="{base}/sweeps/question/logs/slurm-%A_%a.log"',
        '--signal="B:USR1@180"',
        "--open-mode=append",
        "--requeue",
        '--partition=gpu --comment="a b" --gpus-per-task=1',
        '--array="0-2%2"',
    ]
    report = (base / "sweeps" / "question" / "slurm_report.sh").read_text()
    assert '--dependency="afterany:71"' in options(report)
    assert report.rstrip().endswith("--data stdlib --run try --report")
    assert subprocess.run(["bash", "-n"], input=script + report, text=True).returncode == 0
    output = capsys.readouterr().out
    assert "0 of 3 runs finished, 0 in the queue, 3 to submit" in output
    assert "submitted as job 71" in output and "squeue --jobs=71" in output


def test_what_is_finished_or_in_the_queue_is_not_submitted_again(submit, base, capsys):
    finish(base, TAGS[0])
    assert options(submit())[-1] == '--array="0-1"'
    # "lower" waits; the other jobs are another user's
    (submit.bin / "squeue.says").write_text("71 1 question\n70 0 other\n71 0 other\n")
    (submit.bin / "sbatch.says").write_text("80;cluster\n")
    script = submit()
    assert options(script)[-1] == '--array="0-0"' and f"TAGS=(\n  {TAGS[1]}\n)" in script
    assert "afterany:71:80" in (base / "sweeps" / "question" / "slurm_report.sh").read_text()
    (submit.bin / "squeue.says").write_text("71 1 question\n80 0 question\n")
    calls = len(submit.calls())
    submit()
    assert [call.split()[0] for call in submit.calls()[calls:]] == ["squeue"]
    assert "1 of 3 runs finished, 2 in the queue as job 71, 80, 0 to submit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, message",
    [
        ("--array=0-3", "--array=0-3 cannot be given"),
        ("-a 0-3", "-a cannot be given"),
        ("--job-name=x", "--job-name=x cannot be given"),
        ("--comment=a\x1b[31m", r"--sbatch '--comment=a\\x1b.31m': give options"),
        ('--comment="a', "no closing quotation"),
        ("gpu", "give options of sbatch"),
    ],
)
def test_options_that_cannot_be(submit, given, message):
    with pytest.raises(InputError, match=message):
        submit(f"--sbatch={given}")


def test_sbatch_refuses(submit, base):
    errors = (
        "sbatch: error: invalid partition specified: gpux",
        "sbatch: error: Batch job submission failed",
    )
    (submit.bin / "sbatch.fails").write_text("\n".join(errors) + "\n")
    with pytest.raises(InputError, match=f"^--launcher slurm: {' '.join(errors)}$"):
        submit("--sbatch=--partition=gpux")
    assert not (base / "sweeps" / "question" / "slurm_jobs.json").exists()


def test_no_slurm(submit, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="there is no sbatch here; .*--launcher local"):
        submit()


# ---- names that a shell would take for more ----------------------------------------------------------------

HOSTILE = "a \"b\" 'c' $(touch pwned) `touch pwned` ;touch pwned; %A #é {name}"


def test_no_name_is_executed_in_a_batch_script(submit, tmp_path, monkeypatch, capsys):
    """bash parses both scripts, runs them, and does nothing but start the task."""
    here = tmp_path / HOSTILE.format(name="here")
    base = tmp_path / HOSTILE.format(name="base")
    here.mkdir()
    python = here / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(here)
    preset = "é (b)=@, c"
    experiment = here / "question.toml"
    experiment.write_text(EXPERIMENT.format(steps=6) + f"[preset.'{preset}.']\nseeds = [2]\n")
    name = HOSTILE.format(name="run")
    args = sweep.build_parser().parse_args(
        [
            str(experiment),
            "--preset",
            f"{preset}.",
            "--data",
            "stdlib",
            f"--run=-{name}",
            "--sbatch=--comment='x\ntouch pwned' --time=4\ntouch pwned",
        ]
    )
    slurm.submit(sweep.load(args), args)
    folder = base / "sweeps" / f"question-{preset}."
    script, report = ((folder / file).read_text() for file in ("slurm.sh", "slurm_report.sh"))
    logs = str(folder / "logs").replace("%", "%%").replace('"', r"\"")  # as sbatch 22.05 reads it
    assert options(script)[:2] == [f'--job-name="question-{preset}."', f'--output="{logs}/slurm-%A_%a.log"']
    assert [line for line in script.splitlines() if line.startswith("touch")] == []
    tail = next(line for line in capsys.readouterr().out.splitlines() if "tail -f" in line)
    log = f"{folder}/logs/question-{preset}._full_s2.log"
    assert shlex.split(tail.split(":", 1)[1]) == ["tail", "-f", log]

    command = [str(experiment), "--preset", f"{preset}.", "--data", "stdlib", f"--run=-{name}"]
    numbers = {"SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "0", "SLURM_CPUS_ON_NODE": "6"}
    for text, last in ((script, ["--task", f"question-{preset}._full_s2"]), (report, ["--report"])):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        done = subprocess.run(
            ["bash", "-c", text], capture_output=True, text=True, cwd=tmp_path, env=os.environ | numbers
        )
        assert done.returncode == 0, done.stderr
        output = (folder / "logs" / f"{last[1]}.log").read_text() if len(last) > 1 else done.stdout
        assert output.split("\0")[:-1] == ["-m", "scripts.sweep", *command, *last]
    assert not list(tmp_path.rglob("pwned*")) and not (ROOT / "pwned").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"71\ntouch pwned": {"0": "a"}},
        {"71": {"0": "../a"}},
        {"71": {"0\n": "a"}},
        {"71": {"0": 3}},
        {"71": ["a"]},
        {"": {}},
        {"٣": {}},
        ["71"],
        "71",
    ],
)
def test_a_record_of_jobs_that_somebody_wrote_is_no_part_of_a_script(submit, base, content):
    path = base / "sweeps" / "question" / "slurm_jobs.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as e:
        submit()
    assert str(e.value).startswith(f"{path}: ") and str(e.value).isprintable()


@pytest.mark.parametrize("answer", ["71\n#SBATCH --wrap=x", "Submitted 71", "", "71:72"])
def test_only_a_number_is_taken_for_a_job(submit, answer):
    (submit.bin / "sbatch.says").write_text(answer)
    with pytest.raises(InputError, match="--launcher slurm: sbatch answers .*, which is no number of a job"):
        submit()


def test_a_folder_that_slurm_cannot_write_logs_to_is_refused(submit, base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", f"{base}\\n")
    with pytest.raises(InputError, match="Slurm takes no folder for its logs that has a backslash"):
        submit()


# ---- what a task does --------------------------------------------------------------------------------------


@pytest.fixture
def task(submit, base, tmp_path, monkeypatch):
    """task(script) -> the started array task 71_1, in which `script` stands in for the run."""
    run = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(run))
    (submit.bin / "squeue.says").write_text("RUNNING\n")

    def start(script, **env):
        run.write_text(f'#!/usr/bin/env bash\necho "threads $OMP_NUM_THREADS" "$@"\n{script}\n')
        run.chmod(0o755)
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | env
        return subprocess.Popen(
            ["bash", "-c", submit()],
            stdout=subprocess.PIPE,
            text=True,
            env=environment
            | {"SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_ON_NODE": "6"},
        )

    start.log = base / "sweeps" / "question" / "logs" / f"{TAGS[1]}.log"
    start.requeued = lambda: (
        [call for call in submit.calls() if call.startswith("scontrol")] == ["scontrol requeue 71_1"]
    )
    return start


def started(task, process):
    for _ in range(200):
        if task.log.exists() and "ready" in task.log.read_text():
            return process
        time.sleep(0.02)
    raise AssertionError("the stand-in does not start")


SAVES = f"trap 'echo saved; exit {REQUEUE}' TERM; echo ready; while true; do sleep 0.05; done"


def test_a_run_gets_its_cores_and_its_log(task):
    process = task("exit 3")
    assert process.wait(20) == 3 and not task.requeued()  # an error is no reason to try again
    assert (
        f"--data stdlib --run dummy --task {TAGS[1]}\n" in task.log.read_text()
        and task.log.read_text().startswith("threads 6 -m scripts.sweep /")
    )
    assert TAGS[1] in process.stdout.read()


@pytest.mark.parametrize("number", ENDING, ids=signal_name)
def test_a_signal_makes_the_run_save_and_the_task_wait_in_the_queue_again(task, number):
    process = started(task, task(SAVES, OMP_NUM_THREADS="2"))
    process.send_signal(number)
    assert process.wait(20) == REQUEUE and task.requeued()
    assert task.log.read_text().startswith("threads 2") and "saved" in task.log.read_text()


def test_a_signal_while_the_run_still_starts(task):
    process = started(task, task("echo ready; exec sleep 20"))
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 128 + signal.SIGTERM and task.requeued()


def test_a_cancelled_task_stays_out_of_the_queue(task, submit):
    process = started(task, task(SAVES))
    (submit.bin / "squeue.says").write_text("COMPLETING\n")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == REQUEUE and not task.requeued()


# ---- a real cluster ----------------------------------------------------------------------------------------


def states(job) -> list[str]:
    return subprocess.run(
        ["squeue", "--noheader", "--array", f"--jobs={job}", "--format=%T"], capture_output=True, text=True
    ).stdout.split()


def wait_for(what, seconds, condition):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def steps_of(tag) -> int:
    path = metrics.runs_dir() / tag / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def status_of(tag) -> str:
    return metrics.load_run(metrics.runs_dir() / tag).summary["status"]


@pytest.fixture
def cluster():
    """A Slurm that answers, as dev/slurm/local_cluster.sh makes it. After the test its jobs are cancelled."""
    if not shutil.which("sbatch") or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm here that answers; bash dev/slurm/local_cluster.sh start makes one")
    yield
    for name in ("question", "question-report"):
        subprocess.run(["scancel", "--me", f"--name={name}"])


@pytest.mark.slurm
@pytest.mark.parametrize(
    "preemption",
    [
        ["scontrol", "requeue", "JOB_0"],
        ["sbatch", *URGENT_JOB],
    ],
)
def test_a_real_cluster_preempts_runs_and_they_end_finished(
    preemption, cluster, base_dir, corpus_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    steps = 250
    (tmp_path / "question.toml").write_text(EXPERIMENT.format(steps=steps))
    flags = ["--data", str(corpus_dir), "--launcher", "slurm", "--sbatch=--time=10"]
    command = [str(tmp_path / "question.toml"), *flags]
    sweep.main(command)
    sweep.main(command)  # changes nothing: they are in the queue
    ((job, tasks),) = json.loads((base_dir / "sweeps/question/slurm_jobs.json").read_text()).items()
    assert tasks == dict(zip("012", TAGS)) and "3 in the queue as job" in capsys.readouterr().out
    wait_for("two runs train", 90, lambda: steps_of(TAGS[0]) > 5 and steps_of(TAGS[1]) > 5)
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{job}_1"], check=True)  # as near the time limit
    wait_for("one saves", 30, lambda: status_of(TAGS[1]) == "stopped")
    subprocess.run([word.replace("JOB", job) for word in preemption], check=True)
    wait_for("the other saves", 30, lambda: status_of(TAGS[0]) == "stopped")
    wait_for("all end", 240, lambda: not states(job))
    report = base_dir / "sweeps" / "question" / "report" / "report.html"
    wait_for("the report", 60, report.exists)
    assert sorted(p.name for p in metrics.runs_dir().iterdir()) == sorted(TAGS)
    for tag in TAGS:
        run = metrics.load_run(metrics.runs_dir() / tag)
        assert run.summary["status"] == "finished" and [e["step"] for e in run.history] == list(
            range(1, steps + 1)
        )
        log = (base_dir / "sweeps" / "question" / "logs" / f"slurm-{job}_{TAGS.index(tag)}.log").read_text()
        assert f", start {1 if tag == TAGS[2] else 2}: {tag}" in log  # the third may have been preempted too
    assert all(tag in report.read_text() for tag in TAGS)


@pytest.mark.slurm
def test_a_real_cluster_lets_a_cancelled_sweep_lie_until_it_is_submitted_again(
    cluster, base_dir, corpus_dir, tmp_path, capsys
):
    (tmp_path / "question.toml").write_text(EXPERIMENT.format(steps=100000))
    command = [str(tmp_path / "question.toml"), "--data", str(corpus_dir), "--launcher", "slurm", "-j", "1"]
    sweep.main(command)
    (job,) = json.loads((base_dir / "sweeps/question/slurm_jobs.json").read_text())
    wait_for("a run trains", 90, lambda: steps_of(TAGS[0]) > 5)
    assert states(job).count("RUNNING") == 1  # -j 1
    advice = next(line for line in capsys.readouterr().out.splitlines() if "scancel" in line)
    subprocess.run(advice.split(":")[1].split(), check=True)
    wait_for("nothing waits or runs", 60, lambda: not states(job))
    time.sleep(3)
    assert not states(job) and status_of(TAGS[0]) == "stopped"
    sweep.main(command)
    assert "0 in the queue, 3 to submit" in capsys.readouterr().out
