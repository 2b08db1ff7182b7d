"""A sweep on a Slurm cluster: a job array with one task for each run, then a job that makes the report.

Runs that start from other runs are a second array, which waits until all tasks of the first have ended well.
A task that is preempted, or near its time limit, gets a signal. It lets its run save and puts itself back
into the queue; later the run continues from there. A run that is finished or in the queue is not submitted
again.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from nanochat import common
from nanochat.arguments import quoted
from nanochat.errors import InputError, printable
from nanochat.files import Schema, create_folder, read_json, write_atomic, write_json
from nanochat.naming import check_tag, lock_path, option, shell_command
from nanochat.sweep.experiment import Point, Sweep

JOBS = Schema("record of submitted jobs", {}, remedy="cancel the jobs of this sweep, and remove it")
# seconds between the signal and the time limit, to finish a step and write a checkpoint. Slurm may send the
# signal up to a minute early
SAVING_SECONDS = 180
ARRAY_OPTIONS = ("--array", "--job-name", "--wrap")  # of sbatch: the sweep sets them itself

# the end of a batch script: one task of the array
RUN_TASK = r"""
TAG=${TAGS[$SLURM_ARRAY_TASK_ID]}
THIS=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
CORES=$((SLURM_CPUS_ON_NODE > PROCESSES ? SLURM_CPUS_ON_NODE / PROCESSES : 1))
[ -n "${OMP_NUM_THREADS:-}" ] || OMP_NUM_THREADS=$CORES
export OMP_NUM_THREADS
START=$((${SLURM_RESTART_COUNT:-0} + 1))
echo "$(printf '%(%F %T)T' -1) $THIS on $HOSTNAME, start $START: $TAG, log: $LOGS/$TAG.log"

# Slurm signals this shell, which passes it on: the run saves its state and exits with 75. A run that is still
# starting has no handler for signals; it just ends.
ASKED= AGAIN= RUN=
trap 'ASKED=yes AGAIN=yes; [ -z "$RUN" ] || kill -TERM "$RUN" 2>/dev/null' TERM USR1 USR2 HUP INT QUIT
"${SWEEP[@]}" --task "$TAG" >> "$LOGS/$TAG.log" 2>&1 &
RUN=$!
# a signal ends `wait` early, with a code of its own: wait again
while AGAIN=; wait "$RUN"; CODE=$?; [ -n "$AGAIN" ]; do :; done

# A job that is no longer RUNNING was cancelled by its owner, or Slurm puts it back into the queue itself.
if [ "$CODE" = 75 ] || { [ "$CODE" != 0 ] && [ -n "$ASKED" ]; }; then
  [ "$(squeue --noheader --jobs="$THIS" --format=%T)" != RUNNING ] || scontrol requeue "$THIS"
fi
echo "$(printf '%(%F %T)T' -1) $THIS ends with code $CODE"
exit "$CODE"
"""


def submit(sweep: Sweep, args):
    """Submit the runs that are neither finished nor in the queue, then the report, and say how to watch them.

    args: those of scripts.sweep; used here are run, out, j and sbatch. The batch scripts are written into the
    sweep's folder. InputError if there is no Slurm, or if it refuses.
    """
    check_cluster(args.sbatch)
    check_log_folder(log_folder(sweep))
    create_folder(log_folder(sweep))
    with common.claimed(lock_path(sweep.name, "slurm"), f"--launcher slurm: {sweep.name}"):
        # first the queue, then the statuses: a run that leaves the queue in between counts as finished
        jobs = jobs_in_queue(sweep)
        queued = {tag for tasks in jobs.values() for tag in tasks.values()}
        finished = {point.tag for point in sweep.points if point.status() == "finished"}
        points = [point for point in sweep.points if point.tag not in finished | queued]
        job_names = f" as job {', '.join(jobs)}" if jobs else ""
        print(
            f"{sweep.name}: {len(finished)} of {len(sweep.points)} runs finished, "
            f"{len(queued)} in the queue{job_names}, {len(points)} to submit"
        )
        if not points:
            return
        submitted = submit_arrays(sweep, points, jobs, args)
        report = sbatch(sweep.folder / "slurm_report.sh", report_script(sweep, list(jobs), args))
    print(f"submitted as job {', '.join(submitted)}, the report as job {report}")
    log = log_folder(sweep) / f"{points[0].tag}.log"
    print_advice("what waits and runs", "squeue", f"--jobs={','.join([*jobs, report])}")
    print_advice("one run", "tail", "-f", log)
    print_advice("save, and go on later", "scontrol", "requeue", submitted[0])
    print_advice("save and stop; submitting again goes on", "scancel", *jobs, report)


def submit_arrays(sweep: Sweep, points: list[Point], jobs: dict, args) -> list[str]:
    """Submit the points as one or two arrays; those that start from others wait. Returns the ids of the jobs.

    jobs: see `read_jobs`; the new ones are added to it, and to the record on disk.
    """
    stages = {
        "slurm.sh": [point for point in points if not point.base],
        "slurm_adapters.sh": [point for point in points if point.base],
    }
    submitted = []
    for file, stage in stages.items():
        if stage:
            bases = {point.base for point in stage}
            awaited = [job for job, tasks in jobs.items() if bases & set(tasks.values())]
            job = sbatch(sweep.folder / file, runs_script(sweep, stage, args, awaited))
            submitted.append(job)
            jobs[job] = {str(task): point.tag for task, point in enumerate(stage)}
            write_json(jobs_path(sweep), jobs)
    return submitted


def print_advice(purpose: str, *command):
    print(f"  {purpose + ':':40} {shell_command(*command)}")


# ---- the queue ---------------------------------------------------------------------------------------------


def jobs_path(sweep: Sweep) -> Path:
    return sweep.folder / "slurm_jobs.json"


def read_jobs(path: Path) -> dict[str, dict[str, str]]:
    """{id of a job array: {task: tag}} of all jobs that were submitted for a sweep.

    The values become words of batch scripts, so a value of a wrong type is an InputError.
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
    jobs = read_jobs(jobs_path(sweep))
    if not jobs:
        return {}
    alive = {job: {} for job in jobs}
    for line in run_slurm("squeue", "--me", "--noheader", "--array", "--format=%F %K %j").splitlines():
        job, task, name = (*line.split(maxsplit=2), "", "", "")[:3]
        # a cluster that was set up again counts jobs from 1
        if name.strip() == sweep.name and task in jobs.get(job, ()):
            alive[job][task] = jobs[job][task]
    return {job: tasks for job, tasks in alive.items() if tasks}


def check_cluster(options: str):
    """InputError if there is no Slurm, or an option of --sbatch is wrong or would replace the array."""
    if not all(map(shutil.which, ("sbatch", "squeue"))):
        raise InputError(
            "--launcher slurm: there is no sbatch here; "
            "use it on a login node of the cluster, or --launcher local"
        )
    if not " ".join(options.splitlines()).isprintable():
        raise InputError(f"--sbatch {quoted(options)}: give options of sbatch, without control characters")
    try:
        words = shlex.split(options)
    except ValueError as e:
        raise InputError(f"--sbatch {options}: {str(e).lower()}") from None
    if words and not words[0].startswith("-"):
        raise InputError(
            f'--sbatch {options}: give options of sbatch, such as --sbatch="--partition=gpu --time=4:00:00"'
        )
    for word in words:
        if word.split("=")[0] in ARRAY_OPTIONS or word[:2] in ("-a", "-J"):
            raise InputError(
                f"--sbatch: {word} cannot be given: the sweep makes and names its own array; "
                "-j N limits how many runs run at once"
            )


def run_slurm(*command: str) -> str:
    """What a command of Slurm prints. InputError with the command's message if it fails."""
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if result.returncode:
        reason = " ".join(result.stderr.split()) or f"exit code {result.returncode}"
        raise InputError(f"--launcher slurm: {reason}")
    return result.stdout


def sbatch(path: Path, script: str) -> str:
    """Write and submit a batch script. Returns the id of the job."""
    write_atomic(path, os.fsencode(script))  # a path in it need not be UTF-8
    answer = run_slurm("sbatch", "--parsable", str(path.absolute())).strip()
    job = answer.split(";")[0]  # id[;cluster]
    if not (job.isascii() and job.isdigit()):
        raise InputError(f"--launcher slurm: sbatch answers {quoted(answer)}, which is no number of a job")
    return job


def log_folder(sweep: Sweep) -> Path:
    return (sweep.folder / "logs").absolute()


def check_log_folder(folder: Path):
    """InputError if sbatch cannot take the name: it drops backslashes, and its options end with the line."""
    if "\\" in str(folder) or not str(folder).isprintable():
        raise InputError(
            f"--launcher slurm: {folder}: Slurm takes no folder for its logs that has a "
            "backslash or a control character in its name; give another NANOCHAT_BASE_DIR"
        )


# ---- batch scripts -----------------------------------------------------------------------------------------


def runs_script(sweep: Sweep, points: list[Point], args, awaited: list[str]) -> str:
    """The job array over `points`: task k runs points[k].

    It starts when all `awaited` jobs have ended well; if one fails, it never starts.
    """
    defaults = {
        "job-name": sweep.name,
        "output": log_name(sweep, "slurm-%A_%a.log"),
        "signal": f"B:USR1@{SAVING_SECONDS}",
    }
    at_once = f"%{args.j}" if args.j else ""
    fixed = {"array": f"0-{len(points) - 1}{at_once}"}
    if awaited:
        fixed |= {"dependency": f"afterok:{':'.join(awaited)}", "kill-on-invalid-dep": "yes"}
    lines = [
        *script_head(sweep, args.sbatch, defaults, fixed),
        f"LOGS={shlex.quote(str(log_folder(sweep)))}",
        f"PROCESSES={sweep.processes}",
        f"SWEEP=({shlex.join(sweep_command(sweep, args))})",
        "TAGS=(",
        *(f"  {shlex.quote(point.tag)}" for point in points),
        ")",
        RUN_TASK,
    ]
    return "\n".join(lines)


def report_script(sweep: Sweep, jobs: list[str], args) -> str:
    """The report, once no task of `jobs` waits or runs. Its job fails if runs are missing, and names them."""
    defaults = {"job-name": f"{sweep.name}-report", "output": log_name(sweep, "slurm-report.log")}
    lines = [
        *script_head(sweep, args.sbatch, defaults, {"dependency": f"afterany:{':'.join(jobs)}"}),
        f"exec {shlex.join([*sweep_command(sweep, args), '--report'])}",
        "",
    ]
    return "\n".join(lines)


def log_name(sweep: Sweep, pattern: str) -> str:
    """sbatch's pattern for a log's name, in the folder of the logs. A % of the folder is written as %%."""
    return f"{str(log_folder(sweep)).replace('%', '%%')}/{pattern}"


def script_head(sweep: Sweep, user_options: str, defaults: dict, fixed: dict) -> list[str]:
    """The first lines of both scripts. Of two equal options sbatch takes the later one.

    So user_options, written unchanged, win over `defaults`, and `fixed` wins over both.
    """
    return [
        "#!/usr/bin/env bash",
        printable(f"# {sweep.name}: written by scripts.sweep --launcher slurm"),
        *option_lines(defaults),
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
        *([printable(f"#SBATCH {user_options}")] if user_options else []),
        *option_lines(fixed),
        "",
        f"cd {shlex.quote(os.getcwd())} || exit",
        f"export NANOCHAT_BASE_DIR={shlex.quote(str(common.get_base_dir().absolute()))}",
    ]


def option_lines(options: dict) -> list[str]:
    return [printable(f"#SBATCH --{name}={double_quoted(value)}") for name, value in options.items()]


def double_quoted(value: str) -> str:
    r"""A value for a line of sbatch options: it knows \" and \\, but no variables."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def sweep_command(sweep: Sweep, args) -> list[str]:
    """This sweep's command for another machine with the same files. --task or --report is added to it."""
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
