"""A sweep on a Slurm cluster: a job array with one task a run, then a job that makes the report.

Runs that start from other runs are a second array, which waits until all tasks of the first have ended well. A task that is preempted,
or comes near its time limit, gets a signal, lets its run save its state, and puts itself back into the queue, where it goes on from
there. A run that is finished or still in the queue is not submitted again.
"""
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from nanochat import common, metrics
from nanochat.common import InputError
from nanochat.experiment import Point, Sweep
from nanochat.files import write_atomic

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
trap 'ASKED=yes AGAIN=yes; [ -z "$RUN" ] || kill -TERM "$RUN" 2>/dev/null' TERM USR1
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
    (sweep.folder / "logs").mkdir(parents=True, exist_ok=True)
    with common.claimed(common.get_base_dir() / "locks" / f"{sweep.name}.slurm.lock", f"--launcher slurm: {sweep.name}"):
        jobs = jobs_in_queue(sweep)  # first: a run that leaves the queue meanwhile is then seen to be finished
        queued = {tag for tasks in jobs.values() for tag in tasks.values()}
        finished = {p.tag for p in sweep.points if p.status() == "finished"}
        points = [p for p in sweep.points if p.tag not in finished | queued]
        print(f"{sweep.name}: {len(finished)} of {len(sweep.points)} runs finished, {len(queued)} in the queue"
              + (f" as job {', '.join(jobs)}" if jobs else "") + f", {len(points)} to submit")
        if not points:
            return
        submitted = []
        for name, stage in (("slurm.sh", [p for p in points if not p.base]), ("slurm_adapters.sh", [p for p in points if p.base])):
            if stage:
                bases = {p.base for p in stage}
                awaited = [job for job, tasks in jobs.items() if bases & set(tasks.values())]
                submitted.append(sbatch(sweep.folder / name, runs_script(sweep, stage, args, awaited)))
                jobs[submitted[-1]] = {str(task): p.tag for task, p in enumerate(stage)}
                write_atomic(record_of(sweep), json.dumps(jobs, indent=2) + "\n")
        report = sbatch(sweep.folder / "slurm_report.sh", report_script(sweep, list(jobs), args))
    print(f"submitted as job {', '.join(submitted)}, the report as job {report}")
    for what, command in (("what waits and runs", ["squeue", f"--jobs={','.join([*jobs, report])}"]),
                          ("one run", ["tail", "-f", f"{sweep.folder / 'logs' / points[0].tag}.log"]),
                          ("save, and go on later", ["scontrol", "requeue", submitted[0]]),
                          ("save and stop; submitting again goes on", ["scancel", *jobs, report])):
        print(f"  {what + ':':40} {shlex.join(command)}")


# ---- the queue ------------------------------------------------------------------------------------------------------

def record_of(sweep: Sweep) -> Path:
    return sweep.folder / "slurm_jobs.json"


def jobs_in_queue(sweep: Sweep) -> dict[str, dict[str, str]]:
    """{job array: {task: tag}} of the tasks that wait or run, of all jobs that were submitted for this sweep."""
    jobs = metrics.read_json(record_of(sweep)) if record_of(sweep).exists() else {}
    alive = {job: {} for job in jobs}
    for line in slurm("squeue", "--me", "--noheader", "--array", "--format=%F %K %j").splitlines() if jobs else ():
        job, task, name = line.split(maxsplit=2)
        if name == sweep.name and task in jobs.get(job, ()):  # a cluster that was set up anew counts jobs from 1 again
            alive[job][task] = jobs[job][task]
    return {job: tasks for job, tasks in alive.items() if tasks}


def check(text: str):
    """InputError where there is no Slurm, or the user's options of sbatch are none, or would take the array apart."""
    if not all(map(shutil.which, ("sbatch", "squeue"))):
        raise InputError("--launcher slurm: there is no sbatch here; use it on a login node of the cluster, or --launcher local")
    try:
        words = shlex.split(text)
    except ValueError as e:
        raise InputError(f"--sbatch {text}: {str(e).lower()}") from None
    if words and not words[0].startswith("-"):
        raise InputError(f"--sbatch {text}: give options of sbatch, such as --sbatch=\"--partition=gpu --time=4:00:00\"")
    for word in words:
        if word.split("=")[0] in ("--array", "--job-name", "--wrap") or word[:2] in ("-a", "-J"):
            raise InputError(f"--sbatch: {word} is not to be given: the sweep makes and names its own array; -j N limits how many run at once")


def slurm(*command: str) -> str:
    """stdout of one of Slurm's commands; InputError with its own words if it fails."""
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise InputError(f"--launcher slurm: {said}")
    return done.stdout


def sbatch(path: Path, script: str) -> str:
    """Write and submit a batch script. Returns the job's id."""
    write_atomic(path, script)
    return slurm("sbatch", "--parsable", str(path)).strip().split(";")[0]  # id[;cluster]


# ---- batch scripts --------------------------------------------------------------------------------------------------

def runs_script(sweep: Sweep, points: list[Point], args, awaited: list[str] = ()) -> str:
    """The job array over `points`: task k runs points[k], once the jobs `awaited` have ended well; where one has not, never."""
    after = {"dependency": f"afterok:{':'.join(awaited)}", "kill-on-invalid-dep": "yes"} if awaited else {}
    return "\n".join([
        *head(sweep, args.sbatch, {"job-name": sweep.name, "output": sweep.folder / "logs" / "slurm-%A_%a.log", "signal": f"B:USR1@{SAVING_SECONDS}"},
              {"array": f"0-{len(points) - 1}" + (f"%{args.j}" if args.j else ""), **after}),
        f"LOGS={shlex.quote(str(sweep.folder / 'logs'))}",
        f"PROCESSES={sweep.processes}",
        f"SWEEP=({shlex.join(sweep_command(sweep, args))})",
        "TAGS=(", *(f"  {shlex.quote(p.tag)}" for p in points), ")",
        RUN_ONE])


def report_script(sweep: Sweep, jobs: list[str], args) -> str:
    """The report once no task of `jobs` waits or runs. The job names the unfinished runs, and then fails."""
    return "\n".join([
        *head(sweep, args.sbatch, {"job-name": f"{sweep.name}-report", "output": sweep.folder / "logs" / "slurm-report.log"},
              {"dependency": f"afterany:{':'.join(jobs)}"}),
        f"exec {shlex.join([*sweep_command(sweep, args), '--report'])}", ""])


def head(sweep: Sweep, given: str, defaults: dict, fixed: dict) -> list[str]:
    """What both scripts begin with. Of two equal options sbatch takes the later: the user's, given as they are, win over our defaults."""
    def lines(options):
        return [f'#SBATCH --{name}="{value}"' for name, value in options.items()]
    return ["#!/usr/bin/env bash", f"# {sweep.name}: written by scripts.sweep --launcher slurm",
            *lines(defaults), "#SBATCH --open-mode=append", "#SBATCH --requeue", *([f"#SBATCH {' '.join(given.splitlines())}"] if given else []),
            *lines(fixed), "",
            f"cd {shlex.quote(os.getcwd())} || exit",
            f"export NANOCHAT_BASE_DIR={shlex.quote(str(common.get_base_dir().absolute()))}"]


def sweep_command(sweep: Sweep, args) -> list[str]:
    """This sweep's command line, as another machine with the same files would run it; --task or --report is to be added."""
    return [sys.executable, "-m", "scripts.sweep", str(sweep.file.absolute()), *(["--preset", sweep.preset] if sweep.preset else []),
            *sweep.data_flags(), "--run", args.run, *(["--out", os.path.abspath(args.out)] if args.out else [])]
