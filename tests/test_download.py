"""`python -m nanochat.dataset` as a subprocess, against a local server that acts as the hub, with faults."""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat import hub as hub_files
from nanochat.dataset import open_corpus
from nanochat.errors import InputError
from nanochat.fingerprints import file_stamp

CLIMBMIX = "karpathy/climbmix-400b-shuffle"
VAL = "shard_06542.parquet"
COMMIT = "c0ffee" * 6 + "c0ff"


def parquet_bytes(text):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [text] * 100}), buffer)
    return buffer.getvalue()


class Hub(ThreadingHTTPServer):
    """One dataset repository. faults[method, file] lists the faults of the next requests."""

    def __init__(self, repo, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo = repo
        self.files = files
        self.faults = defaultdict(list)
        self.requests = []  # (method, file) of the resolve calls
        self.kept_in = {}  # file -> 'git' or 'nothing': where it is not in LFS, or the hub tells no sum
        self.strange = []  # entries that its listing begins with
        self.tokens = set()
        self.stalled = threading.Event()
        self.release = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self):
        return [file for method, file in self.requests if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def log_message(self, *args):
        pass

    def answer(self, method):
        hub = self.server
        path = urlsplit(self.path).path
        if hub.repo in path:
            hub.tokens.add(self.headers.get("Authorization"))
        api = f"/api/datasets/{hub.repo}"
        resolve = f"/datasets/{hub.repo}/resolve/{COMMIT}/"
        tree = f"{api}/tree/{COMMIT}"
        if path == api:
            self.send(
                self.next_fault(method, "info") or 200, json.dumps({"id": hub.repo, "sha": COMMIT}).encode()
            )
        elif path == tree or path.startswith(tree + "/"):
            folder = path[len(tree) :].strip("/")
            listing = hub.strange + [self.tree_entry(f) for f in hub.files if f.rpartition("/")[0] == folder]
            self.send(self.next_fault(method, "list") or 200, json.dumps(listing).encode())
        elif path.startswith(resolve) and (file := path.removeprefix(resolve)) in hub.files:
            hub.requests.append((method, file))
            self.send_file(method, file, self.next_fault(method, file))
        else:
            self.send(404)

    def next_fault(self, method, file):
        faults = self.server.faults[method, file]
        return faults.pop(0) if faults else None

    def tree_entry(self, file):
        content = self.server.files[file]
        size = len(content)
        sha = hashlib.sha256(content).hexdigest()
        blob = {"git": hashlib.sha1(b"blob %d\0%s" % (size, content)).hexdigest(), "nothing": ""}
        if where := self.server.kept_in.get(file):
            return {"type": "file", "path": file, "size": size, "oid": blob[where]}
        return {
            "type": "file",
            "path": file,
            "size": size,
            "oid": "0" * 40,
            "lfs": {"oid": sha, "size": size, "pointerSize": 100},
        }

    def send_file(self, method, file, fault):
        body = self.server.files[file]
        sha = hashlib.sha256(body).hexdigest()
        size = len(body)
        headers = {
            "ETag": f'"{sha}"',
            "X-Linked-Etag": f'"{sha}"',
            "X-Linked-Size": size,
            "X-Repo-Commit": COMMIT,
        }
        if isinstance(fault, int):
            self.send(fault)
        elif fault == "drop":  # the connection ends in the middle
            self.send(200, body[: size // 2], headers | {"Content-Length": size})
        elif fault == "truncate":  # a complete answer, of half a file
            self.send(200, body[: size // 2], headers)
        elif fault == "corrupt":
            self.send(200, body[: size // 2] + bytes([body[size // 2] ^ 1]) + body[size // 2 + 1 :], headers)
        elif fault == "endless":
            self.send(200, body, headers | {"Content-Length": None})
            with contextlib.suppress(OSError):
                while not self.server.release.is_set():
                    self.wfile.write(bytes(2**20))
        elif fault == "stall":
            self.send(200, body[: size // 2], headers | {"Content-Length": size})
            self.server.stalled.set()
            self.server.release.wait(30)
        else:
            self.send(200, body if method == "GET" else b"", headers | {"Content-Length": size})

    def send(self, status, body=b"", headers=None):
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def serve(repo, files):
    hub = Hub(repo, files)
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.release.set()
        hub.shutdown()
        hub.server_close()


@pytest.fixture
def hub():
    names = [*(f"shard_{i:05d}.parquet" for i in range(5)), VAL]
    with serve(CLIMBMIX, {name: parquet_bytes(f"text of {name}") for name in names}) as hub:
        yield hub


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


# `python -m nanochat.dataset` that waits a twentieth of the seconds before it tries again
HURRIED = (
    "import runpy, time; sleep = time.sleep; time.sleep = lambda seconds: sleep(seconds / 20); "
    "runpy.run_module('nanochat.dataset', run_name='__main__', alter_sys=True)"
)


def environment(url):
    env = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")
    }
    home = os.environ["NANOCHAT_BASE_DIR"] + "/hf"
    return env | {"HF_ENDPOINT": url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}


def start(url, *args, token=None):
    env = environment(url)
    env |= {"HF_TOKEN": token} if token else {}
    # a suite that runs in the background ignores SIGINT, and so would its children
    return subprocess.Popen(
        [sys.executable, "-c", HURRIED, *args],
        cwd=Path(dataset.__file__).parents[1],
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def download(url, *args, **kwargs):
    """(exit code, stdout, lines of stderr)"""
    process = start(url, *args, **kwargs)
    stdout, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    return process.returncode, stdout, stderr.splitlines()


def folder_of(name):
    """{file name: content} of what is visible of a downloaded set."""
    folder = dataset.get_base_dir() / "data" / name
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith(".")}


def test_faults_that_pass_end_in_whole_files(hub):
    hub.faults["GET", "info"] = [503]
    hub.faults["GET", "list"] = [429, 503]
    hub.faults["GET", "shard_00000.parquet"] = ["drop"]
    hub.faults["GET", "shard_00001.parquet"] = ["truncate"]
    hub.faults["GET", "shard_00002.parquet"] = ["corrupt"]
    hub.faults["GET", "shard_00003.parquet"] = [503, 429]
    hub.faults["HEAD", "shard_00004.parquet"] = [503, 503, 429]
    hub.faults["GET", VAL] = [429]
    code, stdout, errors = download(hub.url, "--data", "climbmix", "-n", "5", "-w", "6")
    assert (code, errors) == (0, [])
    assert "5 training files and the validation file" in stdout
    assert folder_of("climbmix") == hub.files
    assert not any(hub.faults.values()), "every fault was met"
    assert hub.tokens == {None}
    corpus = open_corpus("climbmix")
    assert [s.name for s in corpus.val] == [VAL] and len(corpus.train) == 5
    assert set(corpus.documents("val")) == {f"text of {VAL}"}


def test_missing_shards_are_named_and_only_they_are_fetched_again(hub):
    del hub.files["shard_00001.parquet"]
    hub.faults["GET", "shard_00002.parquet"] = ["corrupt"] * 10
    hub.faults["HEAD", "shard_00003.parquet"] = [404]
    code, _, errors = download(hub.url, "--data", "climbmix", "-n", "4", "-w", "4")
    assert code == 2 and len(errors) == 4
    reasons = {
        "missing shard_00001": "no file",
        "missing shard_00002": "checksum",
        "missing shard_00003": "404",
    }
    for line, (start, reason) in zip(errors, reasons.items()):
        assert line.startswith(f"{start}.parquet: ") and CLIMBMIX in line and reason in line
    assert errors[-1].startswith("error: --data climbmix: 3 of 5 files missing")
    assert set(folder_of("climbmix")) == {"shard_00000.parquet", VAL}
    assert [s.name for s in open_corpus("climbmix").val] == [VAL]

    hub.files["shard_00001.parquet"] = parquet_bytes("late")
    hub.faults.clear()
    hub.requests.clear()
    code, _, errors = download(hub.url, "--data", "climbmix", "-n", "4")
    assert (code, errors) == (0, [])
    assert sorted(hub.fetched()) == [f"shard_0000{i}.parquet" for i in (1, 2, 3)]


def test_validation_comes_first_and_without_it_there_is_no_corpus(hub):
    hub.faults["HEAD", VAL] = [404]
    code, _, errors = download(hub.url, "--data", "climbmix", "-n", "2", "-w", "1")
    assert code == 2 and len(errors) == 2
    assert hub.requests[0] == ("HEAD", VAL)
    assert set(folder_of("climbmix")) == {"shard_00000.parquet", "shard_00001.parquet"}, "the others are kept"
    with pytest.raises(
        InputError, match=f"{VAL} is missing; run: python -m nanochat.dataset --data climbmix"
    ):
        open_corpus("climbmix")


def test_a_complete_set_needs_no_network_and_no_network_is_one_line(hub):
    assert download(hub.url, "--data", "climbmix", "-n", "1")[0] == 0
    hub.shutdown()
    hub.server_close()
    assert download(hub.url, "--data", "climbmix", "-n", "1")[0] == 0
    code, _, errors = download(hub.url, "--data", "climbmix", "-n", "2")
    assert code == 2 and len(errors) == 1
    assert hub.url in errors[0] and "refused" in errors[0] and "HF_ENDPOINT" in errors[0]


def test_unknown_repository_is_one_line(hub):
    code, _, errors = download(hub.url, "--data", "fineweb-edu", "-n", "1")
    assert code == 2 and len(errors) == 1
    assert "karpathy/fineweb-edu-100b-shuffle" in errors[0] and "404" in errors[0]


def test_tinystories_files_are_found_by_the_start_of_their_names():
    names = [f"data/train-0000{i}-of-00004-2d5a1467fff1081b.parquet" for i in range(4)]
    names += ["data/validation-00000-of-00001-869c898b519ad725.parquet", "README.md"]
    with serve("roneneldan/TinyStories", {name: parquet_bytes(name) for name in names}) as hub:
        # it has 4 files, fewer than the default of 8
        code, stdout, errors = download(hub.url, "--data", "tinystories", token="hf_secret")
        assert (code, errors) == (0, [])
        assert "hf_secret" not in stdout
        assert hub.tokens == {"Bearer hf_secret"}
        corpus = open_corpus("tinystories")
        assert [s.name for s in corpus.train] == [f"train-0000{i}-of-00004.parquet" for i in range(4)]
        assert [set(s.documents()) for s in corpus.train] == [{name} for name in names[:4]]
        assert set(corpus.documents("val")) == {names[4]}


def test_c4_files_are_those_of_its_english_folder():
    names = [
        "c4-train.00000-of-01024.json.gz",
        "c4-train.00001-of-01024.json.gz",
        "c4-validation.00000-of-00008.json.gz",
    ]
    files = {
        f"{folder}/{name}": gzip.compress(json.dumps({"text": f"{folder} {name}", "url": "u"}).encode())
        for folder in ("en", "en.noclean")
        for name in names
    }
    with serve("allenai/c4", files) as hub:
        hub.faults["GET", f"en/{names[1]}"] = ["corrupt"]
        code, _, errors = download(hub.url, "--data", "c4", "-n", "2")
        assert (code, errors) == (0, [])
        assert folder_of("c4") == {name: files[f"en/{name}"] for name in names}
    corpus = open_corpus("c4")
    assert list(corpus.documents("train")) == [f"en {name}" for name in names[:2]]
    assert list(corpus.documents("val")) == [f"en {names[2]}"]


def test_interrupted_download_leaves_only_whole_files(hub):
    hub.faults["GET", "shard_00001.parquet"] = ["stall"]
    process = start(hub.url, "--data", "climbmix", "-n", "2", "-w", "1")
    assert hub.stalled.wait(30)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert folder_of("climbmix") == {name: hub.files[name] for name in ("shard_00000.parquet", VAL)}
    assert download(hub.url, "--data", "climbmix", "-n", "2")[0] == 0
    hidden = {
        f.name for f in (dataset.get_base_dir() / "data" / "climbmix").iterdir() if f.name.startswith(".")
    }
    assert hidden == {".lock", ".index.json"}, "the part of a file is cleared away"


def test_two_downloads_at_once_fetch_each_file_once(hub):
    processes = [start(hub.url, "--data", "climbmix", "-n", "3") for _ in range(2)]
    assert [p.wait(60) for p in processes] == [0, 0]
    for p in processes:
        p.communicate()
    assert sorted(hub.fetched()) == sorted(set(hub.fetched())) and len(hub.fetched()) == 4


@pytest.mark.parametrize(
    "args, words",
    [
        (["--data", "climbmix", "-n", "6543"], "has 6542 training files"),
        (["--data", "tinystories", "-n", "5"], "has 4 training files"),
        (["--data", "wikipedia"], "invalid choice: 'wikipedia'"),
        (["--data", "climbmix", "-w", "0"], "not a whole number >= 1"),
        ([], "required: --data"),
    ],
)
def test_bad_arguments(args, words, base_dir):
    with pytest.raises(InputError, match=words):
        dataset.main(args)
    assert not any(base_dir.iterdir())


def test_a_full_disk_ends_the_download_at_once():
    def full():
        attempts.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    attempts = []
    with pytest.raises(OSError, match="No space left"):
        hub_files.with_retries(full)
    assert len(attempts) == 1


# ---- files that are there already --------------------------------------------------------------------------

# Reads calls of `python -m nanochat.dataset`, one a line. Importing takes longer than they do.
CONVERSATION = """
import json, sys, time
from nanochat import dataset, hub
from nanochat.errors import InputError
sleep, time.sleep, hub.SPARE_BYTES = time.sleep, lambda seconds: sleep(seconds / 20), 2**20
for line in sys.stdin:
    code = 0
    try:
        dataset.main(json.loads(line))
    except InputError as e:
        print(f"error: {e}")
        code = 2
    print("code", code, flush=True)
"""


@pytest.fixture
def call(hub):
    """call('-n', '2') -> (exit code, lines) of `python -m nanochat.dataset --data climbmix -n 2`."""
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERSATION],
        cwd=Path(dataset.__file__).parents[1],
        env=environment(hub.url),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def call(*args):
        hub.requests.clear()
        process.stdin.write(json.dumps(["--data", "climbmix", *args]) + "\n")
        process.stdin.flush()
        lines = []
        while not (line := process.stdout.readline()).startswith("code "):
            assert line, "it has ended"
            lines.append(line.rstrip())
        return int(line.split()[1]), lines

    yield call
    process.stdin.close()
    assert process.wait(20) == 0


def changed(path, offset, data):
    """Another content of the same size; the file before."""
    before = path.read_bytes()
    path.write_bytes(before[:offset] + data + before[offset + len(data) :])
    return before


NAMES = [f"shard_0000{i}.parquet" for i in range(4)]


@pytest.fixture
def folder(hub, call, base_dir):
    """A downloaded set with its validation file and NAMES."""
    assert call("-n", "4")[0] == 0 and len(hub.fetched()) == 5
    return base_dir / "data/climbmix"


def test_every_call_compares_the_files_that_are_there(hub, call, folder):
    assert call("-n", "4")[0] == 0 and hub.fetched() == []

    # what power cuts leave, and a changed byte, also in files beyond those that the call asks for
    (folder / NAMES[0]).write_bytes(b"")
    changed(folder / NAMES[1], 0, bytes(8))
    changed(folder / NAMES[3], 50, b"?")
    message = f"{folder / NAMES[0]} has 0 bytes instead of {len(hub.files[NAMES[0]])}"
    with pytest.raises(InputError, match=f"{message}; to fetch it again run: python -m nanochat.dataset"):
        open_corpus("climbmix")
    code, lines = call("-n", "1")
    assert code == 0 and sorted(hub.fetched()) == [NAMES[0], NAMES[1], NAMES[3]]
    notes = [line for line in lines if line.endswith(": has another checksum: fetched again")]
    assert notes == [f"{folder / name}: has another checksum: fetched again" for name in (NAMES[1], NAMES[3])]
    assert folder_of("climbmix").items() <= hub.files.items() and len(open_corpus("climbmix").train) == 4

    # a copy of the folder, or one of an earlier version: read once, and not fetched
    (folder / ".index.json").unlink()
    (folder / NAMES[2]).write_bytes(b"")
    with pytest.raises(InputError, match=r"is damaged \(0 bytes\)"):
        open_corpus("climbmix")
    assert call("-n", "4")[0] == 0 and hub.fetched() == [NAMES[2]]


def test_verify_finds_damage_that_the_times_of_a_file_do_not_tell(hub, call, folder):
    changed(folder / NAMES[2], 50, b"?")
    index = json.loads((folder / ".index.json").read_text())
    index["files"][NAMES[2]]["stamp"] = file_stamp((folder / NAMES[2]).stat())
    (folder / ".index.json").write_text(json.dumps(index))
    assert call("-n", "4")[0] == 0 and hub.fetched() == []
    hub.faults["GET", NAMES[2]] = ["corrupt"] * 3
    code, lines = call("--verify")
    assert code == 2 and "1 of 5 files missing" in lines[-1]
    with pytest.raises(InputError, match=f"{NAMES[2]} differs from the hub's; to fetch it again run"):
        open_corpus("climbmix")
    code, lines = call("--verify")
    assert code == 0 and hub.fetched() == [NAMES[2]]
    assert lines[-2].startswith("climbmix: 4 training files")
    assert "token caches of these files: 0 read" in lines[-1]


def test_a_damaged_index_and_a_new_version_on_the_hub(hub, call, folder):
    wrong = '{"files": {"shard_00001.parquet": {"size": "1"}}}'
    for content in ("", "[]", '{"files": []}', wrong, '{"format": 9}'):
        (folder / ".index.json").write_text(content)
        assert len(open_corpus("climbmix").train) == 4
        assert call("-n", "2")[0] == 0 and hub.fetched() == []

    # the hub has another file now, and does not get it here: the old one is used until then
    hub.files[NAMES[0]] = parquet_bytes("new")
    hub.faults["HEAD", NAMES[0]] = [404]
    assert call("-n", "2")[0] == 2 and len(open_corpus("climbmix").train) == 4
    assert call("-n", "2")[0] == 0 and folder_of("climbmix")[NAMES[0]] == hub.files[NAMES[0]]


def test_without_the_hub_files_are_compared_with_the_index(hub, call, folder):
    hub.shutdown()
    hub.server_close()
    code, lines = call("-n", "4")
    assert code == 0 and "refused" in lines[0] and "compared with the checksums of their download" in lines[0]
    changed(folder / NAMES[1], 50, b"?")
    code, lines = call("-n", "4")
    assert code == 2 and len(lines) == 1 and f"{NAMES[1]} has another checksum; 1 of 5 files" in lines[0]


def test_files_that_are_not_in_lfs_or_have_no_sum_or_no_end(hub, call):
    hub.kept_in = {"shard_00000.parquet": "git", "shard_00001.parquet": "nothing"}
    hub.faults["GET", "shard_00000.parquet"] = ["corrupt"]
    hub.faults["GET", "shard_00002.parquet"] = ["endless"] * 3
    code, lines = call("-n", "3", "-w", "1")
    assert code == 2 and hub.fetched().count("shard_00000.parquet") == 2
    assert folder_of("climbmix") == {
        name: hub.files[name] for name in ("shard_00000.parquet", "shard_00001.parquet", VAL)
    }
    assert "1 file(s) (shard_00001.parquet, …) are compared by size alone: the hub has no" in "".join(lines)
    assert "1 of 4 files missing" in lines[-1]
    file = {"type": "file", "oid": 7}
    hub.strange = [
        {"type": "directory", "path": "shard_00002.parquet", "oid": "0"},
        *(file | {"path": path, "size": 9} for path in (5, None, "shard_00002/../evil.parquet")),
        *(file | {"path": "shard_00002.parquet", "size": n} for n in ("9", None, -1, 10**30)),
    ]
    assert call("-n", "3")[0] == 0 and hub.fetched() == ["shard_00002.parquet"]
