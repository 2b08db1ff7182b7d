"""Runs read from W&B instead of their folders, in the shape that metrics.load_run gives them.

W&B has what metrics.RunRecord sent: no text samples, and no value that was None. Keys that begin with _ are
W&B's own: they are left out.
"""

import math
import sys

from nanochat.errors import InputError, printable
from nanochat.files import is_kind
from nanochat.history import History, row_fault
from nanochat.metrics import Run
from nanochat.naming import LONGEST_RUN_NAME, is_tag

NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # JSON has no such numbers: W&B gives them as text


def runs_from_wandb(spec: str) -> list[Run]:
    """The runs of "ENTITY/PROJECT" or "ENTITY/PROJECT/GROUP", oldest first.

    Runs of other programs are left out and named on stderr. InputError: a bad spec, no login, no network, no
    such project, no run in the group, or none made by scripts.base_train.
    """
    parts = spec.split("/", 2)  # a group's name may hold a slash
    if len(parts) < 2 or not all(part.strip() for part in parts):
        raise InputError(f"--from-wandb {spec}: give ENTITY/PROJECT or ENTITY/PROJECT/GROUP")
    entity, project, group = (*parts, None)[:3]

    import wandb  # here, since it takes a second that reports over folders need not pay

    try:
        api = wandb.Api(overrides={"entity": entity, "project": project})
        runs = list(fetch(api, entity, project, {"group": group} if group else {}))
        if group and not runs:
            groups = sorted({run.group for run in fetch(api, entity, project, {}) if run.group})
            choices = ", ".join(groups[:20]) or "none"
            raise InputError(f"--from-wandb {spec}: no run in the group {group}; groups there: {choices}")
        return read_runs(spec, runs)
    except wandb.errors.UsageError as e:  # no key, and no terminal on which W&B could ask for one
        remedy = "run `wandb login`, or set WANDB_API_KEY"
        raise InputError(f"--from-wandb {spec}: not logged in to W&B; {remedy}") from e
    except Exception as e:  # W&B's errors have no class in common but the module
        if not type(e).__module__.startswith(("wandb", "requests")):
            raise
        raise InputError(f"--from-wandb {spec}: {explain(e)}") from e


def read_runs(spec: str, runs: list) -> list[Run]:
    """Those made by scripts.base_train, under names that tell them apart; the others are named on stderr."""
    own_runs = [run for run in runs if is_own(run)]
    if not own_runs:
        raise InputError(f"--from-wandb {spec}: none of its {len(runs)} runs was made by scripts.base_train")
    foreign = [run.name or run.id for run in runs if run not in own_runs]
    if foreign:
        print(f"left out, not made by scripts.base_train: {', '.join(foreign)}", file=sys.stderr)
    names = [run_name(run) for run in own_runs]
    results = []
    for run, name in zip(own_runs, names):
        results.append(read_run(run, name if names.count(name) == 1 else f"{name} ({run.id})"))
    return results


def is_own(run) -> bool:
    return isinstance(run.config.get("flags"), dict) and isinstance(run.config.get("derived"), dict)


def fetch(api, entity: str, project: str, filters: dict):
    """The runs that match, as wandb's own objects, oldest first."""
    try:
        yield from api.runs(f"{entity}/{project}", filters=filters, order="+created_at", lazy=False)
    except ValueError as e:  # how wandb.Api says that there is none, or none that this user may see
        server = api.settings["base_url"]
        raise InputError(
            f"--from-wandb {entity}/{project}: no such project on {server}, or none that you may read"
        ) from e


def explain(error: Exception) -> str:
    """The reason why W&B did not answer, and a remedy, in one line."""
    text = " ".join(str(error).split())[:200]
    answer = getattr(error.__cause__ or error, "response", None)
    status = getattr(answer, "http_status", 0)
    if status in (401, 403):
        remedy = "run `wandb login --relogin`, or set WANDB_API_KEY"
        return f"W&B does not accept the API key (HTTP {status}); {remedy}"
    if status:
        return f"W&B says: {text}"
    return f"no answer from W&B ({text}); check the network, WANDB_BASE_URL and WANDB_API_KEY"


def run_name(run) -> str:
    """The tag, if the run sent one; else its name on the dashboard, which may be any text."""
    for sent in (run.config.get("tag"), run.config["flags"].get("model_tag")):
        if is_tag(sent):
            return sent
    return printable(str(run.name or run.id))[:LONGEST_RUN_NAME]


def read_run(run, name: str) -> Run:
    config = dict(run.config)
    accounting = config.pop("accounting", {})
    config.pop("tag", None)
    history = read_history(run, name)
    summary = {}
    for table in (accounting, run.summary_metrics):
        if isinstance(table, dict):
            summary |= without_wandb_keys(flatten(table))
    status = summary.pop("status", "")
    if status not in ("finished", "stopped", "diverged"):
        status = guess_status(run.state, config, summary)
    return Run(name, config, {"status": status, **summary}, history)


def read_history(run, name: str) -> History:
    """As history.read_history of a folder. Rows of other programs, without a step, are left out."""
    rows = []
    faults = []
    for wandb_row in run.scan_history() if run.lastHistoryStep >= 0 else ():
        if not isinstance(wandb_row, dict) or wandb_row.get("step") is None:
            continue
        row = without_wandb_keys(wandb_row)
        fault = row_fault(row)
        if fault:
            faults.append(fault)
        else:
            rows.append(row)
    if faults:
        print(
            f"note: {name} on W&B: {len(faults):,} rows left out, no rows of metrics; the first has "
            f"{faults[0]}",
            file=sys.stderr,
        )
    return History(rows)


def without_wandb_keys(metrics: dict) -> dict:
    """Without W&B's own keys and empty cells; NaN and infinities as numbers."""
    values = {}
    for key, value in metrics.items():
        if not key.startswith("_") and value is not None:
            values[key] = float(value) if isinstance(value, str) and value in NOT_FINITE else value
    return values


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}: a dot in a name may come back as a level."""
    out = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def guess_status(state: str, config: dict, summary: dict) -> str:
    """The status of a run that sent none. "finished" on W&B: the process ended well, perhaps too early."""
    if state != "finished":
        return "running"  # as in a folder whose process was killed
    is_complete = number(summary, "step", 0) >= number(config["derived"], "num_iterations", 0)
    stopped_early = number(summary, "val/ppl", math.inf) <= number(config["flags"], "stop_at_ppl", -1)
    return "finished" if is_complete or stopped_early else "stopped"


def number(table: dict, key: str, default: float) -> float:
    return table[key] if is_kind(table.get(key), float) else default
