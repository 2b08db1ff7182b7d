"""A sweep as a W&B sweep: W&B's server deals out the points, and agents on any machines run them.

Its grid has one parameter, `task`, the tag of a point. An agent runs `python -m scripts.sweep FILE
--task=TAG`, which starts the point's script with the point's flags. A W&B grid over the flags themselves
would be every combination of their values: it could not say "these points, each once", pair a low-rank run
with its full-rank partner, or name the run folders. The flags of every run are in its W&B config, where
columns, filters and parameter importance find them.
"""

import json
import os
import re
import threading

from nanochat import wandb_log
from nanochat.arguments import quoted
from nanochat.errors import InputError
from nanochat.files import write_atomic
from nanochat.naming import option, path_word, shell_command
from nanochat.sweep.experiment import Point, Sweep


def register(sweep: Sweep, args):
    """Register the runs that are not finished, and say how to start agents. InputError if W&B refuses.

    With WANDB_MODE=offline it only writes the file that `wandb sweep` registers. args: of scripts.sweep. Only
    args.run is read, the name on W&B ('dummy': the sweep's name).
    """
    points = [point for point in sweep.points if point.status() != "finished"]
    if not points:
        print(f"{sweep.name}: all {len(sweep.points)} runs are finished, nothing to register")
        return
    path = sweep.folder / "wandb_sweep.yaml"
    config = sweep_config(sweep, points, args.run)
    write_atomic(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")  # JSON is YAML
    project = wandb_log.project(os.environ)
    if os.environ.get("WANDB_MODE") == "offline":
        command = shell_command("wandb", "sweep", *option("--project", project), path.absolute())
        print(f"{path}: {len(points)} runs\n  {command}   # registers them, and says how to start agents")
        return
    sweep_id, trouble = create_sweep(config, project)
    if not sweep_id:
        raise InputError(
            f"--launcher wandb: {trouble}; run `wandb login`, or register {path} later with: wandb sweep"
        )
    if not re.fullmatch(r"[\w/-]+", sweep_id):
        raise InputError(f"--launcher wandb: W&B calls the sweep {quoted(sweep_id)}, which is no name of one")
    command = shell_command("wandb", "agent", *option("--project", project), sweep_id)
    print(
        f"{len(points)} runs; on each machine that has {sweep.file} and the same data, in this folder, "
        f"an agent for each GPU:\n  CUDA_VISIBLE_DEVICES=0 {command}"
    )


def create_sweep(config: dict, project: str) -> tuple[str, str]:
    """(id of a new W&B sweep, ""), or ("", the reason why there is none). It waits for WANDB_INIT_TIMEOUT."""
    answers = []

    def call():
        try:
            import wandb

            answers.append((str(wandb.sweep(config, project=project) or ""), "W&B gave the sweep no name"))
        except Exception as e:  # from wandb, from its libraries, or for a setting that it refuses
            answers.append(("", " ".join(str(e).split()).rstrip(".") or type(e).__name__))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    patience = wandb_log.timeout_seconds("INIT")
    thread.join(patience)
    return answers[0] if answers else ("", f"no answer from W&B within {patience:.0f} s")


def check_for_agents(sweep: Sweep, run: str = ""):
    """InputError if a run starts from another run, or W&B's agents would change a word of the command.

    run: the name on W&B.
    """
    for word in (path_word(sweep.file), *sweep.data_flags(), run):
        if "${" in word or not word.isprintable():  # an agent replaces ${args} and the like
            raise InputError(
                f"--launcher wandb: {quoted(word)}: W&B's agents do not take ${{ and control "
                "characters in a command; rename it"
            )
    for point in sweep.points:
        if point.base:
            raise InputError(
                f"--launcher wandb: {point.tag} starts from the run {point.base}, and agents know no order; "
                "use --launcher local or slurm"
            )


def sweep_config(sweep: Sweep, points: list[Point], run: str) -> dict:
    """The W&B sweep over `points`, each once. run: the name on W&B."""
    flags = [f"{point.tag}: {' '.join(point.varying)}".rstrip(": ") for point in points]
    return {
        "name": sweep.name,
        "description": "\n".join(filter(None, [sweep.question, sweep.cost, *flags])),
        "program": "scripts/sweep.py",
        "method": "grid",
        "metric": {"name": "val/ppl", "goal": "minimize"},
        "parameters": {"task": {"values": [point.tag for point in points]}},
        "command": [
            "${env}",
            "${interpreter}",
            "-m",
            "scripts.sweep",
            path_word(sweep.file),
            *(["--preset", sweep.preset] if sweep.preset else []),
            *sweep.data_flags(),
            *option("--run", sweep.name if run == "dummy" else run),
            "${args}",
        ],
    }


def set_group_and_tags(sweep: Sweep, point: Point):
    """Set the W&B group and tags of a run in the environment, beside what the user has set there."""
    os.environ["WANDB_RUN_GROUP"] = os.environ.get("WANDB_RUN_GROUP") or sweep.name
    words = [word.replace(",", "-") for word in point.varying]
    if any(other.pair == point.tag for other in sweep.points):
        words.append("baseline")
    tags = wandb_log.tags(",".join([os.environ.get("WANDB_TAGS", ""), *words]))
    if tags:
        os.environ["WANDB_TAGS"] = tags
    else:
        os.environ.pop("WANDB_TAGS", None)  # W&B refuses an empty variable
