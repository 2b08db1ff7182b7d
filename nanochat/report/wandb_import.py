"""Runs as W&B keeps them, in the shape that metrics.load_run reads from a folder: for those who have the dashboard only.

What `metrics.RunRecord` sent is all there is: no text samples, and nothing that was None. W&B's own keys (they begin with _) go.
"""

import math
import sys

from nanochat.common import InputError, printable
from nanochat.files import is_kind
from nanochat.history import History, row_fault
from nanochat.metrics import Run
from nanochat.naming import LONGEST_RUN_NAME, is_tag

NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # JSON has no such numbers: W&B hands them out as text


def runs_from_wandb(spec: str) -> list[Run]:
    """The runs of "ENTITY/PROJECT" or "ENTITY/PROJECT/GROUP", oldest first. Runs of other programs are left out and named on stderr.

    InputError: a bad spec, no login, no network, no such project, no run in the group or none of ours.
    """
    parts = spec.split("/", 2)  # a group's name may hold a slash
    if len(parts) < 2 or not all(part.strip() for part in parts):
        raise InputError(f"--from-wandb {spec}: give ENTITY/PROJECT or ENTITY/PROJECT/GROUP")
    entity, project, group = (*parts, None)[:3]

    import wandb  # a second of import time that reports over folders need not pay

    try:
        api = wandb.Api(overrides={"entity": entity, "project": project})
        found = list(fetch(api, entity, project, {"group": group} if group else {}))
        if group and not found:
            groups = sorted({run.group for run in fetch(api, entity, project, {}) if run.group})
            raise InputError(
                f"--from-wandb {spec}: no run in the group {group}; groups there: {', '.join(groups[:20]) or 'none'}"
            )
        ours = [
            run for run in found if all(isinstance(run.config.get(key), dict) for key in ("flags", "derived"))
        ]
        if not ours:
            raise InputError(
                f"--from-wandb {spec}: none of its {len(found)} runs was made by scripts.base_train"
            )
        if len(ours) < len(found):
            others = [run.name or run.id for run in found if run not in ours]
            print(f"left out, not made by scripts.base_train: {', '.join(others)}", file=sys.stderr)
        names = [run_name(run) for run in ours]
        return [
            read_run(run, name if names.count(name) == 1 else f"{name} ({run.id})")
            for run, name in zip(ours, names)
        ]
    except wandb.errors.UsageError as e:  # no key, and no terminal on which W&B could ask for one
        raise InputError(
            f"--from-wandb {spec}: not logged in to W&B; run `wandb login`, or set WANDB_API_KEY"
        ) from e
    except Exception as e:
        if not type(e).__module__.startswith(
            ("wandb", "requests")
        ):  # its errors have no class of their own in common
            raise
        raise InputError(f"--from-wandb {spec}: {reason(e)}") from e


def fetch(api, entity: str, project: str, filters: dict):
    """The runs that match, as wandb's own objects, oldest first."""
    try:
        yield from api.runs(f"{entity}/{project}", filters=filters, order="+created_at", lazy=False)
    except ValueError as e:  # how wandb.Api says that there is none, or none that this user may see
        server = api.settings["base_url"]
        raise InputError(
            f"--from-wandb {entity}/{project}: no such project on {server}, or none that you may read"
        ) from e


def reason(error: Exception) -> str:
    """In one line, why W&B did not answer."""
    text = " ".join(str(error).split())[:200]
    answer = getattr(error.__cause__ or error, "response", None)
    status = getattr(answer, "http_status", 0)
    if status in (401, 403):
        return f"W&B does not accept the API key (HTTP {status}); run `wandb login --relogin`, or set WANDB_API_KEY"
    return (
        f"W&B says: {text}"
        if status
        else f"no answer from W&B ({text}); check the network, WANDB_BASE_URL and WANDB_API_KEY"
    )


def run_name(run) -> str:
    """The tag, as of a run folder; where none was sent, the name on the dashboard, which may be any text."""
    for sent in (run.config.get("tag"), run.config["flags"].get("model_tag")):
        if is_tag(sent):
            return sent
    return printable(str(run.name or run.id))[:LONGEST_RUN_NAME]


def read_run(run, name: str) -> Run:
    config = dict(run.config)
    accounting = config.pop("accounting", {})
    config.pop("tag", None)
    history = read_history(run, name)
    known = [table for table in (accounting, run.summary_metrics) if isinstance(table, dict)]
    summary = {}
    for table in known:
        summary |= own(flat(table))
    sent = summary.pop("status", "")
    if sent not in ("finished", "stopped", "diverged"):
        sent = status(run.state, config, summary)
    return Run(name, config, {"status": sent, **summary}, history)


def read_history(run, name: str) -> History:
    """As history.read_history of a folder. Rows of other programs, without a step, are left out."""
    rows = []
    damaged = []
    for row in run.scan_history() if run.lastHistoryStep >= 0 else ():
        if not isinstance(row, dict) or row.get("step") is None:
            continue
        row = own(row)
        fault = row_fault(row)
        if fault:
            damaged.append(fault)
        else:
            rows.append(row)
    if damaged:
        print(
            f"note: {name} on W&B: {len(damaged):,} rows left out, no rows of metrics; the first has "
            f"{damaged[0]}",
            file=sys.stderr,
        )
    return History(rows)


def own(metrics: dict) -> dict:
    """Without W&B's keys and empty cells, numbers as numbers."""
    numbers = {}
    for key, value in metrics.items():
        if not key.startswith("_") and value is not None:
            numbers[key] = float(value) if isinstance(value, str) and value in NOT_FINITE else value
    return numbers


def number(table: dict, key: str, default: float) -> float:
    return table[key] if is_kind(table.get(key), float) else default


def flat(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}: a dot in a name may come back as a level."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def status(state: str, config: dict, summary: dict) -> str:
    """Of a run that sent none. W&B's "finished": its process ended well, perhaps before the last step."""
    if state != "finished":
        return "running"  # as in a folder whose process was killed
    reached = number(summary, "step", 0) >= number(config["derived"], "num_iterations", 0)
    early = number(summary, "val/ppl", math.inf) <= number(config["flags"], "stop_at_ppl", -1)
    return "finished" if reached or early else "stopped"
