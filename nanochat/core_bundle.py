"""The evaluation bundle of the CORE metric: a folder of tasks, which is read and checked, or downloaded once.

core.yaml            icl_tasks: a list of label, dataset_uri, num_fewshot, icl_task_type and perhaps
                     continuation_delimiter
eval_meta_data.csv   columns "Eval Task" and "Random baseline", in percent
eval_data/*.jsonl    one example a line; the dataset_uri of a task is its path in this folder
sha256, fingerprint  only in a downloaded bundle: hashes of the archive, and of the files that are read
"""

import csv
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch.distributed as dist

from nanochat.archives import fetch, unpack
from nanochat.arguments import quoted
from nanochat.common import get_base_dir, locked
from nanochat.errors import InputError, shortened
from nanochat.files import is_kind, parse_json, sync_folder, write_atomic
from nanochat.processes import print0, process_layout

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
# the fields of an example, by the kind of its task
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
REQUIRED = ("label", "dataset_uri", "num_fewshot", "icl_task_type")  # of a task in core.yaml
MAX_INDEX = 2**18  # bytes of core.yaml: parsing YAML is slow; CORE's has 4,000
MAX_YAML_NESTING = 10  # lists and tables inside each other
MAX_TABLE = 2**22  # bytes of eval_meta_data.csv
MAX_BYTES = 2**30  # of all files; a file counts once for each task that reads it
MAX_SHOTS = 1000
INCOMING = ".incoming."  # the start of the name of a folder that a bundle is downloaded into
MAX_OPTIONS = 1000  # answers or contexts of an example: they are scored together


class Unavailable(InputError):
    """There is no bundle on this machine, and it cannot be downloaded."""


@dataclass(frozen=True)
class Task:
    label: str
    kind: str  # a key of FIELDS
    shots: int  # solved examples before the one asked
    delimiter: str  # between a question and its answer
    baseline: float  # accuracy of guessing, in [0, 1)
    examples: list[dict]


@dataclass(frozen=True)
class Bundle:
    folder: Path
    tasks: list[Task]
    fingerprint: str  # a hash of the content of all files that were read
    sha256: str | None  # of the archive, if the bundle was downloaded


def open_bundle(folder: str = "") -> Bundle:
    """The bundle in `folder` (--core-dir). '' = the downloaded bundle; it is downloaded if it is missing.

    Under torchrun, call init_process before. InputError names the file and line of anything that is missing
    or damaged. Unavailable: there is no bundle, and the download failed.
    """
    if folder:
        if not Path(folder).is_dir():
            raise InputError(
                f"--core-dir {folder}: no such folder; give the one that holds core.yaml, "
                "eval_meta_data.csv and eval_data/"
            )
        return read_bundle(Path(folder))
    place = get_base_dir() / "core"
    failures: list[str | None] = [None]
    if process_layout()[1] == 0 and not (place / "eval_bundle").is_dir():  # one process of each machine
        try:
            with locked(place / ".lock"):  # another run waits here, and then finds the bundle
                if not (place / "eval_bundle").is_dir():
                    failures = [download(URL, place)]
        except OSError as e:
            failures = [
                f"{place}: the evaluation bundle cannot be kept there ({e.strerror}); "
                "give the folder of one with --core-dir"
            ]
    if dist.is_initialized():  # all processes continue with the bundle, or all without
        failures *= dist.get_world_size()
        dist.all_gather_object(failures, failures[0])
    if any(failures):
        raise Unavailable(next(filter(None, failures)))
    return read_downloaded(place / "eval_bundle")


# ---- reading -----------------------------------------------------------------------------------------------


class BundleFiles:
    """Reads the files of a bundle, within limits of size, and hashes them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.digest = hashlib.sha256()  # of the content of all files read so far
        self.remaining = MAX_BYTES

    def read(self, name: str, limit: int = MAX_BYTES) -> str:
        """The text of one file. InputError if it is missing, too large or not UTF-8."""
        path = self.folder / name
        if not path.is_file():
            raise InputError(
                f"{path}: missing from the evaluation bundle; unpack it again, "
                "or give a whole one with --core-dir"
            )
        limit = min(limit, self.remaining)
        with open(path, "rb") as f:
            data = f.read(min(limit, path.stat().st_size) + 1)
        if len(data) > limit:
            raise InputError(
                f"{path}: too large: core.yaml may have {MAX_INDEX:,} bytes, eval_meta_data.csv "
                f"{MAX_TABLE:,}, and all that the tasks read {MAX_BYTES:,}"
            )
        self.remaining -= len(data)
        self.digest.update(data)
        try:
            return data.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as e:
            raise InputError(f"{path}: invalid UTF-8 at byte {e.start}") from None


def read_bundle(folder: Path) -> Bundle:
    """The bundle in a folder. InputError names the file and line of anything missing or damaged."""
    files = BundleFiles(folder)
    entries = read_index(folder / "core.yaml", files.read("core.yaml", MAX_INDEX))
    baselines = read_baselines(folder / "eval_meta_data.csv", files.read("eval_meta_data.csv", MAX_TABLE))
    tasks = [read_task(files, entry, baselines) for entry in entries]
    counts = Counter(task.label for task in tasks)
    repeated = sorted(label for label, n in counts.items() if n > 1)
    if repeated:
        raise InputError(f"{folder / 'core.yaml'}: {', '.join(repeated)} listed more than once")
    return Bundle(folder, tasks, files.digest.hexdigest()[:16], read_checksum(folder, "sha256", 64))


def read_downloaded(folder: Path) -> Bundle:
    """read_bundle for a downloaded bundle. InputError also if its files have changed since the download."""
    bundle = read_bundle(folder)
    recorded = read_checksum(folder, "fingerprint", 16)  # None: an earlier version downloaded it
    if recorded not in (None, bundle.fingerprint):
        raise InputError(
            f"{folder}: its files are no longer those that were downloaded; remove the folder, "
            "and the bundle is downloaded again"
        )
    return bundle


def read_checksum(folder: Path, name: str, digits: int) -> str | None:
    """The checksum in a file beside core.yaml, or None if there is no such file."""
    path = folder / name
    if not path.is_file():
        return None
    with open(path, "rb") as f:
        text = f.read(100).decode("utf-8", "replace").strip()
    if not re.fullmatch(f"[0-9a-f]{{{digits}}}", text):
        raise InputError(
            f"{path}: not a checksum of {digits} digits, but {quoted(text)}; "
            "remove the bundle's folder, and it is downloaded again"
        )
    return text


def read_index(path: Path, text: str) -> list[dict]:
    """The entries of core.yaml.

    YAML's aliases are refused: aliases of aliases make a short file as large as one likes.
    """
    import yaml  # here: only CORE needs it

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent) or self.depth > MAX_YAML_NESTING:
                raise yaml.YAMLError("an alias, or lists in lists in lists")
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    try:
        entries = yaml.load(text, Loader)["icl_tasks"]
    except Exception:  # yaml raises many kinds
        entries = None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: no list of tasks under icl_tasks (in YAML without aliases)")
    return entries


def read_baselines(path: Path, text: str) -> dict[str, str]:
    """{task: accuracy of guessing in percent, as the file has it}"""
    try:
        reader = csv.DictReader(io.StringIO(text))
        rows = list(reader)
        columns = reader.fieldnames or []
    except csv.Error as e:
        raise InputError(f"{path}: not a table in CSV: {e}") from None
    if missing := [column for column in ("Eval Task", "Random baseline") if column not in columns]:
        names = " and no column ".join(map(repr, missing))
        raise InputError(f"{path}: no column {names}; there are: {shortened(', '.join(columns)) or 'none'}")
    baselines = {}
    for row in rows:
        task = row["Eval Task"]
        baseline = row["Random baseline"]
        if baselines.setdefault(task, baseline) != baseline:
            raise InputError(
                f"{path}: task {task} is listed twice, "
                f'with "Random baseline" {baselines[task]} and {baseline}; leave one of them'
            )
    return baselines


def percent(text: str) -> float | None:
    """'25' -> 25.0; None if the text is no percentage.

    A number between 0 and 1, such as 0.25, must be a fraction by mistake: 0.25% would be a task with 400
    answers.
    """
    try:
        value = float(text)
    except (ValueError, TypeError):
        return None
    return value if value == 0 or 1 <= value < 100 else None


def read_task(files: BundleFiles, entry: dict, baselines: dict[str, str]) -> Task:
    """The task of an entry of core.yaml, with its examples."""
    where = f"{files.folder / 'core.yaml'}: task {one_line(entry.get('label', '(without a label)'))}"
    if missing := [key for key in REQUIRED if key not in entry]:
        raise InputError(f"{where}: {', '.join(missing)} missing")
    label = entry["label"]
    kind = entry["icl_task_type"]
    shots = entry["num_fewshot"]
    if is_kind(label, float) and abs(label) < 1e9:  # YAML reads a name such as 2048 as a number
        label = str(label)
    if not is_name(label) or len(label) > 100:
        raise InputError(f"{where}: its label is no name on one line, of at most 100 characters")
    if not isinstance(kind, str) or kind not in FIELDS:
        raise InputError(f"{where}: unknown icl_task_type {one_line(kind, repr)}; known: {', '.join(FIELDS)}")
    shots = shots[0] if isinstance(shots, list) and len(shots) == 1 else shots
    if type(shots) is not int or not 0 <= shots <= MAX_SHOTS:
        raise InputError(
            f"{where}: num_fewshot {one_line(shots, repr)} is not a list of one whole number "
            f"up to {MAX_SHOTS:,}"
        )
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(delimiter, str) or not encodable(delimiter):
        raise InputError(f"{where}: continuation_delimiter {one_line(delimiter, repr)} is not text")
    baseline_text = baselines.get(label) or ""
    baseline = percent(baseline_text)
    if baseline is None:
        raise InputError(
            f"{files.folder / 'eval_meta_data.csv'}: "
            f'no "Random baseline" in percent for task {label}: {quoted(baseline_text)}; '
            "give 0, or a number from 1 to below 100, such as 25 for one of four answers"
        )
    name = data_file(entry["dataset_uri"], where)
    examples = []
    for line_number, line in enumerate(files.read(name).split("\n"), 1):
        if line.strip():
            examples.append(read_example(line, kind, f"{files.folder / name}: line {line_number}"))
    if len(examples) <= shots:
        raise InputError(
            f"{files.folder / name}: {len(examples)} examples, but task {label} asks about one "
            f"after showing {shots} others"
        )
    return Task(label, kind, shots, delimiter, baseline / 100, examples)


def is_name(value) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def data_file(uri, where: str) -> str:
    """The path of a task's examples inside the bundle. InputError if it leads out of eval_data/."""
    path = PurePosixPath(uri) if is_name(uri) and len(uri) < 250 else None
    if path is None or path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}: dataset_uri {one_line(uri, repr)} is no path of a file in eval_data/")
    return f"eval_data/{uri}"


def one_line(value, write=str) -> str:
    """A value from YAML, of any kind, on one line."""
    try:
        return " ".join(shortened(write(value)).split())
    except (ValueError, RecursionError):  # Python refuses to write numbers of more than 4,300 digits
        return "(a value too large to show)"


def read_example(line: str, kind: str, where: str) -> dict:
    """One line of a task file, with its fields checked. Other fields are dropped."""
    content = parse_json(line)
    if not isinstance(content, dict):
        raise InputError(f"{where}: not a JSON object")
    if missing := [name for name in FIELDS[kind] if name not in content]:
        raise InputError(
            f"{where}: {', '.join(map(repr, missing))} missing; "
            f"a {kind} example has {', '.join(FIELDS[kind])}"
        )
    example = {name: content[name] for name in FIELDS[kind]}
    for name, value in example.items():
        if name in ("query", "context", "continuation") and not isinstance(value, str):
            raise InputError(f"{where}: {name!r} is not text")
        if name in ("choices", "context_options"):
            check_options(name, value, example["gold"], where)
        texts = value if isinstance(value, list) else [value]
        if not all(encodable(text) for text in texts if isinstance(text, str)):
            raise InputError(f"{where}: {name!r} has half of a surrogate pair, which is no character")
    return example


def check_options(name: str, options, gold, where: str):
    """InputError unless `options` are texts and `gold` is the index of one."""
    are_texts = isinstance(options, list) and all(isinstance(option, str) for option in options)
    if not are_texts or len(options) < 2:
        raise InputError(f"{where}: {name!r} is not a list of two texts or more")
    if len(options) > MAX_OPTIONS:
        raise InputError(f"{where}: {name!r} has {len(options):,} texts, more than {MAX_OPTIONS:,}")
    if type(gold) is not int or not 0 <= gold < len(options):
        raise InputError(
            f"{where}: 'gold' is {one_line(gold, repr)}, not the index of one of the {len(options)} {name}"
        )


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold the text. JSON and YAML can escape half of a surrogate pair; UTF-8 cannot."""
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


# ---- downloading -------------------------------------------------------------------------------------------


def download(url: str, place: Path) -> str | None:
    """Download the archive, check the bundle in it, and move it to place/eval_bundle.

    Returns the reason if that failed, else None. The caller holds the lock of `place`. Nobody publishes a
    checksum of the archive, so the file sha256 records the one of this download.
    """
    print0(f"downloading the evaluation bundle from {url}")
    for unfinished in place.glob(f"{INCOMING}*"):  # of a killed process
        shutil.rmtree(unfinished, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(dir=place, prefix=INCOMING))
    unpacked = staging / "unpacked"
    try:
        sha256 = fetch(url, staging / "bundle.zip")
        unpack(staging / "bundle.zip", unpacked)
        folder = next((path.parent for path in sorted(unpacked.rglob("core.yaml"))), unpacked)
        for name in ("sha256", "fingerprint"):
            (folder / name).unlink(missing_ok=True)  # only this function writes these files
        bundle = read_bundle(folder)
        write_atomic(folder / "sha256", sha256 + "\n")
        write_atomic(folder / "fingerprint", bundle.fingerprint + "\n")
        os.replace(folder, place / "eval_bundle")
        sync_folder(place)
    except (OSError, InputError) as e:
        reason = str(e).replace(f"{unpacked}/", "").replace(f"{staging}/", "")
        return (
            f"no evaluation bundle in {place / 'eval_bundle'}, and downloading {url} failed ({reason}); "
            "fetch that file elsewhere, unzip it, and give its folder with --core-dir"
        )
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return None
