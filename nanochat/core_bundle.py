"""The evaluation bundle of the CORE metric: a folder of tasks, read and checked, or downloaded once.

    core.yaml            icl_tasks: a list of label, dataset_uri, num_fewshot, icl_task_type and perhaps continuation_delimiter
    eval_meta_data.csv   columns "Eval Task" and "Random baseline", in percent
    eval_data/*.jsonl    one example a line, at the dataset_uri of its task
"""
import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from nanochat.common import InputError, get_base_dir, locked, print0, process_layout, quoted, shortened

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# the fields of an example, by the kind of its task
FIELDS = {"multiple_choice": ("query", "choices", "gold"),
          "schema": ("context_options", "continuation", "gold"),
          "language_modeling": ("context", "continuation")}


class Unavailable(InputError):
    """There is no bundle here and it cannot be downloaded."""


@dataclass(frozen=True)
class Task:
    label: str
    kind: str            # a key of FIELDS
    shots: int           # examples shown before the one asked
    delimiter: str       # between a question and its answer
    baseline: float      # accuracy of guessing, in [0, 1)
    examples: list[dict]


@dataclass(frozen=True)
class Bundle:
    folder: Path
    tasks: list[Task]
    fingerprint: str     # of the content of all files that were read
    sha256: str | None   # of the archive, where it was downloaded


def open_bundle(folder: str = "") -> Bundle:
    """The bundle in `folder` (--core-dir); '' = the downloaded one, fetched if it is not there yet. Under torchrun, after init_process.

    InputError: a folder that is none, or a bundle with anything missing or unreadable, named by file and line.
    Unavailable: none here, and none to be had.
    """
    if folder:
        if not Path(folder).is_dir():
            raise InputError(f"--core-dir {folder}: no such folder; give the one that holds core.yaml, eval_meta_data.csv and eval_data/")
        return read_bundle(Path(folder))
    place, failures = get_base_dir() / "core", [None]
    if process_layout()[1] == 0 and not (place / "eval_bundle").is_dir():  # one process a machine
        try:
            with locked(place / ".lock"):  # another run waits, and then finds it
                if not (place / "eval_bundle").is_dir():
                    failures = [download(URL, place)]
        except OSError as e:
            failures = [f"{place}: the evaluation bundle cannot be kept there ({e.strerror}); "
                        "give the folder of one with --core-dir"]
    if dist.is_initialized():  # all go on with the bundle, or all without
        failures *= dist.get_world_size()
        dist.all_gather_object(failures, failures[0])
    if any(failures):
        raise Unavailable(next(filter(None, failures)))
    return read_bundle(place / "eval_bundle")


# ---- reading --------------------------------------------------------------------------------------------------------

def read_bundle(folder: Path) -> Bundle:
    import yaml  # only CORE needs it

    digest = hashlib.sha256()

    def read(name: str) -> str:
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing from the evaluation bundle; unpack it again, or give a whole one with --core-dir")
        data = path.read_bytes()
        digest.update(data)
        try:
            return data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as e:
            raise InputError(f"{path}: invalid UTF-8 at byte {e.start}") from None

    try:
        entries = yaml.safe_load(read("core.yaml"))["icl_tasks"]
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{folder / 'core.yaml'}: no list of tasks under icl_tasks")
    baselines = read_baselines(folder / "eval_meta_data.csv", read("eval_meta_data.csv"))
    tasks = [read_task(folder, entry, baselines, read) for entry in entries]
    labels = [task.label for task in tasks]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"{folder / 'core.yaml'}: {', '.join(twice)} listed more than once")
    archive = folder / "sha256"
    archive_hash = archive.read_text("utf-8").strip() if archive.is_file() else None
    return Bundle(folder, tasks, digest.hexdigest()[:16], archive_hash)


def read_baselines(path: Path, text: str) -> dict[str, str]:
    """{task: accuracy of guessing, in percent, as it is written}."""
    try:
        reader = csv.DictReader(io.StringIO(text))
        rows, columns = list(reader), reader.fieldnames or []
    except csv.Error as e:
        raise InputError(f"{path}: not a table in CSV: {e}") from None
    if missing := [column for column in ("Eval Task", "Random baseline") if column not in columns]:
        there = shortened(", ".join(columns)) or "none"
        raise InputError(f"{path}: no column {' and no column '.join(map(repr, missing))}; "
                         f"there are: {there}")
    baselines = {}
    for row in rows:
        task, baseline = row["Eval Task"], row["Random baseline"]
        if baselines.setdefault(task, baseline) != baseline:
            raise InputError(f"{path}: task {task} is listed twice, "
                             f"with \"Random baseline\" {baselines[task]} and {baseline}; leave one of them")
    return baselines


def percent(text: str) -> float | None:
    """'25' -> 25.0; None where the text is no percentage.

    A number between 0 and 1, such as 0.25, is a fraction by mistake: no task has more than a hundred answers.
    """
    try:
        value = float(text)
    except (ValueError, TypeError):
        return None
    return value if value == 0 or 1 <= value < 100 else None


def read_task(folder: Path, entry: dict, baselines: dict, read) -> Task:
    where = f"{folder / 'core.yaml'}: task {entry.get('label', '(without a label)')}"
    if missing := [key for key in ("label", "dataset_uri", "num_fewshot", "icl_task_type") if key not in entry]:
        raise InputError(f"{where}: {', '.join(missing)} missing")
    label, kind, shots = entry["label"], entry["icl_task_type"], entry["num_fewshot"]
    if not isinstance(kind, str) or kind not in FIELDS:
        raise InputError(f"{where}: unknown icl_task_type {kind!r}; known: {', '.join(FIELDS)}")
    shots = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
    if type(shots) is not int or shots < 0:
        raise InputError(f"{where}: num_fewshot {shots!r} is not a list of one whole number")
    given = baselines.get(str(label))
    if (baseline := percent(given)) is None:
        raise InputError(f"{folder / 'eval_meta_data.csv'}: "
                         f"no \"Random baseline\" in percent for task {label}: {quoted(given or '')}; "
                         "give 0, or a number from 1 to below 100, such as 25 for one of four answers")
    name = f"eval_data/{entry['dataset_uri']}"
    lines = [(number, line) for number, line in enumerate(read(name).split("\n"), 1) if line.strip()]
    examples = [read_example(line, kind, f"{folder / name}: line {number}") for number, line in lines]
    if len(examples) <= shots:
        raise InputError(f"{folder / name}: {len(examples)} examples, but task {label} asks about one after showing {shots} others")
    delimiter = str(entry.get("continuation_delimiter", " "))
    return Task(str(label), kind, shots, delimiter, baseline / 100, examples)


def read_example(line: str, kind: str, where: str) -> dict:
    """One line of a task file, its fields checked; other fields are dropped."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{where}: not a JSON object")
    if missing := [field for field in FIELDS[kind] if field not in found]:
        raise InputError(f"{where}: {', '.join(map(repr, missing))} missing; a {kind} example has {', '.join(FIELDS[kind])}")
    example = {field: found[field] for field in FIELDS[kind]}
    for field, value in example.items():
        if not isinstance(value, int) and not encodable(value):
            raise InputError(f"{where}: {field!r} has half of a surrogate pair, which is no character")
        if field in ("query", "context", "continuation") and not isinstance(value, str):
            raise InputError(f"{where}: {field!r} is not text")
        if field in ("choices", "context_options"):
            if not isinstance(value, list) or len(value) < 2 or not all(isinstance(option, str) for option in value):
                raise InputError(f"{where}: {field!r} is not a list of two texts or more")
            if type(example["gold"]) is not int or not 0 <= example["gold"] < len(value):
                raise InputError(f"{where}: 'gold' is {example['gold']!r}, not the index of one of the {len(value)} {field}")
    return example


def encodable(value) -> bool:
    """Whether all text in it can be written as UTF-8: JSON may hold \\ud800 alone."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
        return True
    except UnicodeEncodeError:
        return False


# ---- downloading ----------------------------------------------------------------------------------------------------

def download(url: str, place: Path) -> str | None:
    """Fetch the archive and put its content at place/eval_bundle, whole and read once, or nothing; then it says why.

    No checksum is published: the archive's own is kept in the file sha256 beside core.yaml.
    """
    from http.client import HTTPException  # a fifth of a second of imports that only a download needs

    print0(f"downloading the evaluation bundle from {url}")
    staging = Path(tempfile.mkdtemp(dir=place, prefix=".incoming."))
    try:
        sha256 = fetch(url, staging / "bundle.zip")
        unpack(staging / "bundle.zip", staging / "unpacked")
        found = next((path.parent for path in sorted((staging / "unpacked").rglob("core.yaml"))), staging / "unpacked")
        read_bundle(found)
        (found / "sha256").write_text(sha256 + "\n", "utf-8")
        os.replace(found, place / "eval_bundle")
    except (OSError, HTTPException, zipfile.BadZipFile, EOFError, InputError) as e:
        reason = (str(e) or type(e).__name__).replace(f"{staging}/unpacked/", "")
        return (f"no evaluation bundle in {place / 'eval_bundle'}, and downloading {url} failed ({reason}); "
                "fetch that file elsewhere, unzip it, and give its folder with --core-dir")
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def fetch(url: str, path: Path) -> str:
    """The SHA-256 of what was downloaded. InputError if less arrived than was announced."""
    import urllib.request

    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=30) as answer, open(path, "wb") as f:
        while block := answer.read(2**20):
            digest.update(block)
            size += f.write(block)
        announced = answer.headers.get("Content-Length")
    if announced and size != int(announced):
        raise InputError(f"{size} of {announced} bytes arrived")
    return digest.hexdigest()


def unpack(archive: Path, folder: Path):
    """InputError, and nothing written, if a path in the archive leads out of the folder."""
    with zipfile.ZipFile(archive) as z:
        for name in z.namelist():
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"the archive holds the path {name!r}, which leads out of its folder")
        z.extractall(folder)  # checks each file's CRC
