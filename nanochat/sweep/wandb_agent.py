"""A sweep as a W&B sweep: the server deals out the points, agents on any machines run them.

The grid has one parameter, `task`, the tag of a point. An agent's command,
`python -m scripts.sweep FILE --task=TAG`, starts base_train with that point's flags (in as many processes as
it has, with --resume auto). A W&B grid over the flags themselves would be every combination of their values:
it cannot say "these points, each once", nor pair a low-rank run with its baseline, nor name the run folders.
The flags of every run are in its W&B config, where columns, filters and parameter importance find them.
"""

import json
import os
import re
import threading

from nanochat import wandb_log
from nanochat.common import InputError, quoted
from nanochat.files import write_atomic
from nanochat.naming import option, path_word, shell_command
from nanochat.sweep.experiment import Point, Sweep


def register(sweep: Sweep, args):
    """Register the runs that are not finished, or, with WANDB_MODE=offline, write what registers them; say how to start agents.

    args: of scripts.sweep; used here is run, the wandb name ('dummy': the sweep's). InputError if W&B refuses.
    """
    points = [p for p in sweep.points if p.status() != "finished"]
    if not points:
        return print(f"{sweep.name}: all {len(sweep.points)} runs are finished, nothing to register")
    path = sweep.folder / "wandb_sweep.yaml"
    config = sweep_config(sweep, points, args.run)
    write_atomic(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")  # JSON is YAML
    project = wandb_log.project(os.environ)
    if os.environ.get("WANDB_MODE") == "offline":
        command = shell_command("wandb", "sweep", *option("--project", project), path.absolute())
        print(f"{path}: {len(points)} runs\n  {command}   # registers them, and says how to start agents")
        return None
    sweep_id, trouble = ask(config, project)
    if sweep_id and not re.fullmatch(r"[\w/-]+", sweep_id):
        raise InputError(f"--launcher wandb: W&B calls the sweep {quoted(sweep_id)}, which is no name of one")
    if not sweep_id:
        raise InputError(
            f"--launcher wandb: {trouble}; run `wandb login`, or register {path} later with: wandb sweep"
        )
    command = shell_command("wandb", "agent", *option("--project", project), sweep_id)
    print(
        f"{len(points)} runs; on each machine that has {sweep.file} and the same data, in this folder, an agent for each GPU:\n"
        f"  CUDA_VISIBLE_DEVICES=0 {command}"
    )


def ask(config: dict, project: str) -> tuple[str, str]:
    """(id of a new W&B sweep, ""), or ("", why there is none). Waits as long as a run does for an answer."""
    answer = []

    def call():
        try:
            import wandb

            answer.append((str(wandb.sweep(config, project=project) or ""), "W&B gave the sweep no name"))
        except Exception as e:  # of wandb, of the libraries below it, or a setting that it refuses
            answer.append(("", " ".join(str(e).split()).rstrip(".") or type(e).__name__))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(wandb_log.seconds("INIT"))
    return answer[0] if answer else ("", f"no answer from W&B within {wandb_log.seconds('INIT'):.0f} s")


def check(sweep: Sweep, run: str = ""):
    """InputError where runs start from other runs, or W&B's agents would change a word of the command. run:
    see sweep_config.
    """
    for word in (path_word(sweep.file), *sweep.data_flags(), run):
        if "${" in word or not word.isprintable():  # ${args} and its like are an agent's own
            raise InputError(
                f"--launcher wandb: {quoted(word)}: W&B's agents do not take ${{ and control "
                "characters in a command; rename it"
            )
    if later := next((p for p in sweep.points if p.base), None):
        raise InputError(
            f"--launcher wandb: {later.tag} starts from the run {later.base}, and agents know no order; use --launcher local or slurm"
        )


def sweep_config(sweep: Sweep, points: list[Point], run: str) -> dict:
    """The W&B sweep over `points`, each once. run: the wandb name to log under."""
    return {
        "name": sweep.name,
        "description": "\n".join(
            filter(
                None,
                [
                    sweep.question,
                    sweep.cost,
                    *(f"{p.tag}: {' '.join(p.varying)}".rstrip(": ") for p in points),
                ],
            )
        ),
        "program": "scripts/sweep.py",
        "method": "grid",
        "metric": {"name": "val/ppl", "goal": "minimize"},
        "parameters": {"task": {"values": [p.tag for p in points]}},
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
