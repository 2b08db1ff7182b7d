"""Findings: what a command under a fault, or after one, must not do.

A finding is (kind, detail). Kinds that begin with "note:" are no faults.
"""

import re
from pathlib import Path

from . import outcome

BY_SIGNAL = (0, -9, -15, 75, 130, 143)  # exit codes of a process that was killed, or asked to stop


def judge_words(result, answer: dict, when: str, dies: bool):
    """Findings in what the processes said and how they ended. dies: one was killed, or asked to stop."""
    if answer["hung"]:
        result.findings.append((f"hang {when}", " | ".join(map(stack_summary, answer["stacks"]))))
    for rank, (out, err) in enumerate(zip(answer["out"], answer["err"])):
        for text in (err, out):
            if outcome.BROKEN.search(text):
                result.findings.append((f"traceback {when}", f"rank {rank}: {outcome.last_words(text)}"))
    if 2 in answer["codes"]:
        result.outcome = result.outcome or "refused"
        if not error_lines(answer):
            result.findings.append((f"no line {when}", [text[-200:] for text in answer["err"]]))
    elif any(answer["codes"]):
        result.outcome = result.outcome or "killed"
        if not dies and not answer["hung"] and set(answer["codes"]) - set(BY_SIGNAL):
            result.findings.append((f"exit code {when}", answer["codes"]))


def judge_lines(result, answer: dict, base: Path, corpus: Path):
    """A finding if a process ended with a line that does not name the file, or a folder around it."""
    result.line = " || ".join(error_lines(answer))
    if not answer["fired"] or not result.line:
        return
    # of any operation that was struck: a checkpoint's writer and the training may fail at once
    places = {Path(operation.split("\t")[2].removesuffix(" (deleted)")) for operation in answer["fired"]}
    # the folder of all text is a good name for a file in it; the base folder is none
    for path in list(places):
        for parent in path.parents:
            if base in parent.parents or corpus in (parent, *parent.parents):
                places.add(parent)
    names = {re.sub(r"/\.([^/]*?)(\.[0-9a-f]{12}\.tmp|\.building)?$", r"/\1", str(place)) for place in places}
    if not any(name in result.line for name in names | set(map(str, places))):
        named = re.search(r"(^|[\s'\"])/\w", result.line)
        kind = "line names another file" if named else "line names no file"
        result.findings.append((kind, hidden(result.line.replace(str(base), ""))))


def error_lines(answer) -> list[str]:
    return [line for err in answer["err"] for line in err.splitlines() if line.startswith("error")]


def stack_summary(text: str) -> str:
    """The innermost functions of this program in a dump of faulthandler: of the main thread, the last one."""
    places = re.findall(outcome.PLACE, text.split("Thread ")[-1])
    return " < ".join(f"{file}:{line} {function}" for file, line, function in places[:3])


# ---- what was written --------------------------------------------------------------------------------------


def compare(result, wanted: dict, base: Path, when: str):
    """Findings where a base folder differs from the outcome of a run without a fault."""
    got = outcome.of_base(base)
    if older := older_checkpoints(wanted, got):
        result.findings.append((f"note: older checkpoints are still there {when}", older))
    if lines := outcome.differences(wanted, got):
        result.findings.append((f"difference {when}", [hidden(line) for line in lines[:6]]))


def older_checkpoints(wanted: dict, got: dict) -> list[str]:
    """Names of checkpoints that were to be removed and are there, whole. They leave `got`."""
    names = []
    for tag, run in wanted["runs"].items():
        weights = got["runs"].get(tag, {}).get("weights", {})
        for name in weights.keys() - run["weights"].keys():
            if outcome.is_digest(weights[name]) and name < max(run["weights"], default=""):
                names.append(f"{tag}/{name}")
                weights.pop(name)
    return names


def compare_names(result, wanted_names: set, base: Path):
    """Findings of files that are left over, or missing. Whole checkpoints are compared elsewhere."""
    names = outcome.names(base)
    metas = base.glob("runs/*/checkpoints/step_*/meta.json")
    whole = {str(path.parent.relative_to(base)) for path in metas if list(path.parent.glob("*.distcp"))}
    left = [name for name in sorted(names - wanted_names) if not {name, name.rpartition("/")[0]} & whole]
    if left:
        result.findings.append(("left over", [hidden(name) for name in left][:4]))
    if lost := wanted_names - names:
        result.findings.append(("missing", sorted(lost)[:4]))


def hidden(text: str) -> str:
    """Without sums and random names."""
    sums = r"(?<![0-9a-f_])(?<!\d\.)[0-9a-f]{12,}"
    return re.sub(sums + r"|(?<=building\.)\w+", "X", text)
