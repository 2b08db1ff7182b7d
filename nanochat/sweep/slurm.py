"""A sweep on a Slurm cluster: a job array with one task a run, then a job that makes the report.

Runs that start from other runs are a second array, which waits until all tasks of the first have ended well. A task that is preempted,
or comes near its time limit, gets a signal, lets its run save its state, and puts itself back into the queue, where it goes on from
there. A run that is finished or still in the queue is not submitted again.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from nanochat import common
from nanochat.common import InputError, printable, quoted
from nanochat.files import Schema, create_folder, read_json, write_atomic, write_json
from nanochat.naming import check_tag, lock_path, option, shell_command
from nanochat.sweep.experiment import Point, Sweep

JOBS = Schema("record of submitted jobs", {}, remedy="cancel the jobs of this sweep, and remove it")
SAVING_SECONDS = 180  # from the signal, which Slurm may send a minute early, to the time limit: to finish a step and write a checkpoint

RUN_ONE = r"""
TAG=${TAGS[$SLURM_ARRAY_TASK_ID]}
THIS=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
[ -n "${OMP_NUM_THREADS:-}" ] || OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > PROCESSES ? SLURM_CPUS_ON_NODE / PROCESSES : 1))
export OMP_NUM_THREADS
START=$((${SLURM_RESTART_COUNT:-0} + 1))
echo "$(printf '%(%F %T)T' -1) $THIS on $HOSTNAME, start $START: $TAG, log: $LOGS/$TAG.log"

# Slurm signals this shell; the run saves its state and exits with 75. It may still be starting and know of no signal: then it just ends.
ASKED= AGAIN= RUN=
trap 'ASKED=yes AGAIN=yes; [ -z "$RUN" ] || kill -TERM "$RUN" 2>/dev/null' TERM USR1 USR2 HUP INT QUIT
"${SWEEP[@]}" --task "$TAG" >> "$LOGS/$TAG.log" 2>&1 &
RUN=$!
while AGAIN=; wait "$RUN"; CODE=$?; [ -n "$AGAIN" ]; do :; done   # the trap ends a wait early, with a code of its own

# A job that is no longer RUNNING was cancelled by its owner, or is put back by Slurm itself.
if [ "$CODE" = 75 ] || { [ "$CODE" != 0 ] && [ -n "$ASKED" ]; }; then
  [ "$(squeue --noheader --jobs="$THIS" --format=%T)" != RUNNING ] || scontrol requeue "$THIS"
fi
echo "$(printf '%(%F %T)T' -1) $THIS ends with code $CODE"
exit "$CODE"
"""


def submit(sweep: Sweep, args):
    """Write the sweep's batch scripts, submit the runs that are neither finished nor in the queue, and say how to watch them.

    args: of scripts.sweep; those used here are run, out, j and sbatch. InputError where there is no Slurm, or it refuses.
    """
    check(args.sbatch)
    check_log_folder(log_folder(sweep))
    create_folder(log_folder(sweep))
    with common.claimed(lock_path(sweep.name, "slurm"), f"--launcher slurm: {sweep.name}"):
        jobs = jobs_in_queue(
            sweep
        )  # first: a run that leaves the queue meanwhile is then seen to be finished
        queued = {tag for tasks in jobs.values() for tag in tasks.values()}
        finished = {p.tag for p in sweep.points if p.status() == "finished"}
        points = [p for p in sweep.points if p.tag not in finished | queued]
        print(
            f"{sweep.name}: {len(finished)} of {len(sweep.points)} runs finished, {len(queued)} in the queue"
            + (f" as job {', '.join(jobs)}" if jobs else "")
            + f", {len(points)} to submit"
        )
        if not points:
            return
        submitted = []
        for name, stage in (
            ("slurm.sh", [p for p in points if not p.base]),
            ("slurm_adapters.sh", [p for p in points if p.base]),
        ):
            if stage:
                bases = {p.base for p in stage}
                awaited = [job for job, tasks in jobs.items() if bases & set(tasks.values())]
                submitted.append(sbatch(sweep.folder / name, runs_script(sweep, stage, args, awaited)))
                jobs[submitted[-1]] = {str(task): p.tag for task, p in enumerate(stage)}
                write_json(record_of(sweep), jobs)
        report = sbatch(sweep.folder / "slurm_report.sh", report_script(sweep, list(jobs), args))
    print(f"submitted as job {', '.join(submitted)}, the report as job {report}")
    for what, command in (
        ("what waits and runs", ["squeue", f"--jobs={','.join([*jobs, report])}"]),
        ("one run", ["tail", "-f", f"{log_folder(sweep) / points[0].tag}.log"]),
        ("save, and go on later", ["scontrol", "requeue", submitted[0]]),
        ("save and stop; submitting again goes on", ["scancel", *jobs, report]),
    ):
        print(f"  {what + ':':40} {shell_command(*command)}")


# ---- the queue ------------------------------------------------------------------------------------------------------


def record_of(sweep: Sweep) -> Path:
    return sweep.folder / "slurm_jobs.json"


def read_jobs(path: Path) -> dict[str, dict[str, str]]:
    """{job array: {task: tag}} of all jobs that were submitted for a sweep. They become words of scripts:
    what is none of these is an InputError.
    """
    jobs = read_json(path, JOBS) if path.exists() else {}
    for job, tasks in jobs.items():
        numbers = [job, *tasks] if isinstance(tasks, dict) else []
        if not numbers or not all(number.isascii() and number.isdigit() for number in numbers):
            raise InputError(f"{path}: {quoted(job)} is no job with its tasks; {JOBS.remedy}")
        for tag in tasks.values():
            check_tag(f"{path}: job {job}", tag)
    return jobs


def jobs_in_queue(sweep: Sweep) -> dict[str, dict[str, str]]:
    """Those of `read_jobs` that wait or run."""
    jobs = read_jobs(record_of(sweep))
    alive = {job: {} for job in jobs}
    for line in (
        slurm("squeue", "--me", "--noheader", "--array", "--format=%F %K %j").splitlines() if jobs else ()
    ):
        job, task, name = (*line.split(maxsplit=2), "", "", "")[:3]
        # a cluster that was set up anew counts jobs from 1 again
        if name.strip() == sweep.name and task in jobs.get(job, ()):
            alive[job][task] = jobs[job][task]
    return {job: tasks for job, tasks in alive.items() if tasks}


def check(text: str):
    """InputError where there is no Slurm, or the user's options of sbatch are none, or would take the array apart."""
    if not all(map(shutil.which, ("sbatch", "squeue"))):
        raise InputError(
            "--launcher slurm: there is no sbatch here; use it on a login node of the cluster, or --launcher local"
        )
    if not " ".join(text.splitlines()).isprintable():
        raise InputError(f"--sbatch {quoted(text)}: give options of sbatch, without control characters")
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise InputError(f"--sbatch {text}: {str(e).lower()}") from None
    if words and not words[0].startswith("-"):
        raise InputError(
            f'--sbatch {text}: give options of sbatch, such as --sbatch="--partition=gpu --time=4:00:00"'
        )
    for word in words:
        if word.split("=")[0] in ("--array", "--job-name", "--wrap") or word[:2] in ("-a", "-J"):
            raise InputError(
                f"--sbatch: {word} is not to be given: the sweep makes and names its own array; -j N limits how many run at once"
            )


def slurm(*command: str) -> str:
    """stdout of one of Slurm's commands; InputError with its own words if it fails."""
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InputError(f"--launcher slurm: {said}")
    return done.stdout


def sbatch(path: Path, script: str) -> str:
    """Write and submit a batch script. Returns the job's id."""
    write_atomic(path, os.fsencode(script))  # a path need not be text
    answer = slurm("sbatch", "--parsable", str(path.absolute())).strip()
    job = answer.split(";")[0]  # id[;cluster]
    if not (job.isascii() and job.isdigit()):
        raise InputError(f"--launcher slurm: sbatch answers {quoted(answer)}, which is no number of a job")
    return job


def log_folder(sweep: Sweep) -> Path:
    return (sweep.folder / "logs").absolute()


def check_log_folder(folder: Path):
    """InputError where Slurm cannot write the name: it drops backslashes, and a line ends an option."""
    if "\\" in str(folder) or not str(folder).isprintable():
        raise InputError(
            f"--launcher slurm: {folder}: Slurm takes no folder for its logs that has a "
            "backslash or a control character in its name; give another NANOCHAT_BASE_DIR"
        )


# ---- batch scripts --------------------------------------------------------------------------------------------------


def runs_script(sweep: Sweep, points: list[Point], args, awaited: list[str] = ()) -> str:
    """The job array over `points`: task k runs points[k], once the jobs `awaited` have ended well; where one has not, never."""
    after = {"dependency": f"afterok:{':'.join(awaited)}", "kill-on-invalid-dep": "yes"} if awaited else {}
    defaults = {
        "job-name": sweep.name,
        "output": log_name(sweep, "slurm-%A_%a.log"),
        "signal": f"B:USR1@{SAVING_SECONDS}",
    }
    return "\n".join(
        [
            *head(
                sweep,
                args.sbatch,
                defaults,
                {"array": f"0-{len(points) - 1}" + (f"%{args.j}" if args.j else ""), **after},
            ),
            f"LOGS={shlex.quote(str(log_folder(sweep)))}",
            f"PROCESSES={sweep.processes}",
            f"SWEEP=({shlex.join(sweep_command(sweep, args))})",
            "TAGS=(",
            *(f"  {shlex.quote(p.tag)}" for p in points),
            ")",
            RUN_ONE,
        ]
    )


def report_script(sweep: Sweep, jobs: list[str], args) -> str:
    """The report once no task of `jobs` waits or runs. The job names the unfinished runs, and then fails."""
    defaults = {"job-name": f"{sweep.name}-report", "output": log_name(sweep, "slurm-report.log")}
    return "\n".join(
        [
            *head(sweep, args.sbatch, defaults, {"dependency": f"afterany:{':'.join(jobs)}"}),
            f"exec {shlex.join([*sweep_command(sweep, args), '--report'])}",
            "",
        ]
    )


def log_name(sweep: Sweep, pattern: str) -> str:
    """The pattern of sbatch, in the folder of the logs: there a % stands for itself."""
    return f"{str(log_folder(sweep)).replace('%', '%%')}/{pattern}"


def head(sweep: Sweep, given: str, defaults: dict, fixed: dict) -> list[str]:
    """What both scripts begin with. Of two equal options sbatch takes the later: the user's, given as they are, win over our defaults."""

    def lines(options):
        return [printable(f"#SBATCH --{name}={in_double_quotes(value)}") for name, value in options.items()]

    return [
        "#!/usr/bin/env bash",
        printable(f"# {sweep.name}: written by scripts.sweep --launcher slurm"),
        *lines(defaults),
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        *([printable(f"#SBATCH {given}")] if given else []),
        *lines(fixed),
        "",
        f"cd {shlex.quote(os.getcwd())} || exit",
        f"export NANOCHAT_BASE_DIR={shlex.quote(str(common.get_base_dir().absolute()))}",
    ]


def in_double_quotes(value: str) -> str:
    r"""A value as sbatch reads it in a script: it knows \" and \\, and no variables."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def sweep_command(sweep: Sweep, args) -> list[str]:
    """This sweep's command line, as another machine with the same files would run it; --task or --report is to be added."""
    return [
        sys.executable,
        "-m",
        "scripts.sweep",
        str(sweep.file.absolute()),
        *(["--preset", sweep.preset] if sweep.preset else []),
        *sweep.data_flags(),
        *option("--run", args.run),
        *(["--out", os.path.abspath(args.out)] if args.out else []),
    ]
