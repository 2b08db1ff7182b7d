"""What a run has written, in a form that two runs can be compared by; and what a process has said."""

import hashlib
import json
import re
from pathlib import Path

# of a record: what differs from run to run
MEASURED = re.compile(r"total_training_time|seconds|/dt$|tok_per_sec|^mem/|mfu|wandb")
NOT_RESULTS = re.compile(r"^locks/|\.lock$|(^|/)wandb(/|_)|\.owner$")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_digest(text: str) -> bool:
    return bool(re.fullmatch("[0-9a-f]{64}", text))


def names(base: Path) -> set[str]:
    """Files and folders in a base folder, but for locks."""
    found = (str(path.relative_to(base)) for path in base.rglob("*"))
    return {name for name in found if not NOT_RESULTS.search(name) and name != "locks"}


def record_rows(path: Path) -> dict:
    """{step: what metrics.jsonl says of it, times left out}: its last word. Torn lines are under "torn"."""
    rows = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            rows.setdefault(str(row["step"]), {}).update(results(row))
        except (ValueError, KeyError, TypeError):
            rows.setdefault("torn", []).append(line.decode(errors="replace")[:80])
    return rows


def results(values: dict) -> dict:
    return {key: value for key, value in values.items() if not MEASURED.search(key)}


def read_json(path: Path):
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        return {"unreadable": f"{path.name}: {e}"}


def of_run(folder: Path) -> dict:
    """Weights, record and summary of a run folder."""
    found = {"record": record_rows(folder / "metrics.jsonl")}
    found["summary"] = results(read_json(folder / "summary.json"))
    found["record"].pop("torn", None)  # a torn line that was ended is allowed
    config = read_json(folder / "config.json")
    found["config"] = {key: config.get(key) for key in ("seed", "derived", "tokenizer")}
    found["tokenizer"] = read_json(folder / "tokenizer.json").get("hash")
    found["weights"] = {}
    for checkpoint in sorted((folder / "checkpoints").glob("step_*")):
        meta = read_json(checkpoint / "meta.json")
        states = sorted(checkpoint.glob("__*_0.distcp"))
        whole = hashlib.sha256(b"".join(state.read_bytes() for state in states)).hexdigest()
        found["weights"][checkpoint.name] = whole if states else "no tensors"
        sums = meta.get("files", {})
        if any(
            not path.exists() or digest(path) != sums[path.name] for path in map(checkpoint.joinpath, sums)
        ):
            found["weights"][checkpoint.name] = "a sum is not that in meta.json"
        if str(meta.get("step")) != str(int(checkpoint.name[5:])):
            found["weights"][checkpoint.name] += f", meta of step {meta.get('step')}"
    return found


def of_base(base: Path) -> dict:
    """All that a base folder holds, as nested dicts of comparable values."""
    found = {"runs": {}, "files": {}}
    for folder in sorted((base / "runs").glob("*")):
        if folder.is_dir():
            found["runs"][folder.name] = of_run(folder)
            for path in sorted([*folder.glob("eval_*.json"), *folder.glob("core_*.json")]):
                found["runs"][folder.name][path.name] = results(read_json(path))
    for path in sorted(base.glob("token_cache/*/*/tokens.bin")):
        found["files"][str(path.relative_to(base))] = digest(path)
    for path in sorted(base.glob("tokenizer/**/tokenizer.json")):
        found["files"][str(path.relative_to(base))] = read_json(path).get("hash")
    for path in sorted(base.glob("data/*/*")):
        if path.is_file() and not path.name.startswith("."):
            found["files"][str(path.relative_to(base))] = digest(path)
    for path in sorted(base.glob("report/*")):
        # pages and figures hold measured times: their end says that they are whole
        end = path.read_bytes()[-9:] if path.is_file() else b"folder"
        found["files"][str(path.relative_to(base))] = repr(end)
    return found


def differences(wanted, got, place="") -> list[str]:
    """Where two nested values differ."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        lines = []
        for key in sorted(wanted.keys() | got.keys(), key=str):
            lines += differences(wanted.get(key), got.get(key), f"{place}/{key}" if place else str(key))
        return lines
    return [] if wanted == got else [f"{place}: {str(wanted)[:60]} became {str(got)[:60]}"]


# ---- what processes say ------------------------------------------------------------------------------------

BROKEN = re.compile(
    r"Traceback \(most recent|terminate called|Exception ignored in|Fatal Python error|"
    r"Segmentation fault|core dumped|what\(\):|Exception in thread"
)


# a line of this program in a traceback, or in a dump of faulthandler
PLACE = r'File "[^"]*?/?((?:nanochat|scripts)/\w+\.py)", line (\d+),? in (\w+)'


def last_words(text: str) -> str:
    """The exception of the last traceback, and where it was raised in this program."""
    lines = [line for line in text.splitlines() if line.strip()]
    places = re.findall(PLACE, text)
    place = " < ".join(f"{file}:{line} {function}" for file, line, function in reversed(places[-3:]))
    lines = [re.sub(r"^\[rank\d\]: |\[[\d.]+\]:\d+", "", line) for line in lines]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Killed|Interrupt|Exit)\b", line)]
    error = (errors or lines or [""])[-1]
    return f"{error[:200]} [{place}]"
