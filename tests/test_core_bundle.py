"""The bundle of CORE from anywhere: hostile archives and servers, odd types in its files, kills."""

import contextlib
import copy
import io
import json
import random
import socket
import stat
import threading
import time
import zipfile
import zlib

import pytest
from conftest import ODD
from test_core_eval import TASKS, edit, files_of, write_bundle, zipped

from nanochat import archives, core_bundle
from nanochat.archives import fetch, unpack
from nanochat.core_bundle import Unavailable, open_bundle, read_bundle, read_example
from nanochat.errors import InputError

ODD_TASKS = [
    *ODD,
    10**30,
    "x\ny",
    "\x1b[31m",
    "../up",
    "/etc/passwd",
    "a" * 300,
    "\ud800",
    [True],
    [10**9],
    {"a": []},
    "2026-01-01",
]


@contextlib.contextmanager
def answering(*parts):
    """The address of a server that sends these bytes; a part may be a function of the connection."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(2**16)
                    for part in parts:
                        part(connection) if callable(part) else connection.sendall(part)

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}/eval_bundle.zip"
    server.close()


def trickle(connection):
    for _ in range(300):
        connection.sendall(b"x")
        time.sleep(0.02)


def endless(connection):
    for _ in range(1000):
        connection.sendall(bytes(2**16))


KEYS = ("label", "dataset_uri", "num_fewshot", "icl_task_type", "continuation_delimiter")
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "parts, message",
    [
        (
            [OK, b"Content-Length: 999999999999\r\n\r\n"],
            "999,999,999,999 bytes announced; at most 256 MiB packed",
        ),
        ([OK, b"\r\n", endless], "more than 100,000 bytes came; at most"),
        ([OK, b"Content-Length: 50\r\n\r\nshort"], "5 of 50 bytes arrived"),
        ([OK, b"\r\n", trickle], r"\d+ bytes in 0 s"),
        ([OK, b"X-Slow: ", trickle], "0 bytes in 0 s"),
        ([trickle], "0 bytes in 0 s"),
        ([b"\xff\xfe nonsense\r\n\r\n"], "nonsense|BadStatusLine"),
        ([], "closed connection|reset by peer"),
        ([b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"], "not allowed|302"),
        ([b"HTTP/1.1 302 Found\r\nLocation: http://[::bad/\r\n\r\n"], "Invalid|302"),
    ],
)
def test_a_server_of_any_manners_is_left_after_a_time(tmp_path, monkeypatch, parts, message):
    if endless in parts:
        monkeypatch.setattr(archives, "MAX_PACKED", 100_000)
    monkeypatch.setattr(archives, "QUIET_SECONDS", 0.2)
    with answering(*parts) as url, pytest.raises(InputError, match=message) as e:
        fetch(url, tmp_path / "x.zip")
    assert "\n" not in str(e.value)


def test_a_download_ends_in_time_even_where_some_bytes_come(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "QUIET_BYTES", 1)
    monkeypatch.setattr(archives, "MAX_SECONDS", 0.3)
    with answering(OK, b"\r\n", trickle) as url, pytest.raises(InputError, match="not there after 0 s"):
        fetch(url, tmp_path / "x.zip")


def test_odd_lengths_do_not_matter(tmp_path):
    for length in (b"", b"-5", b"many", "٣".encode()):
        with answering(OK, b"Content-Length: " + length + b"\r\n\r\nabc") as url:
            path = tmp_path / f"x{length.hex()}"
            fetch(url, path)
        assert path.read_bytes() == b"abc"


# ---- archives ----------------------------------------------------------------------------------------------


def entry(name, mode=0, **settings):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for key, value in settings.items():
        setattr(info, key, value)
    return info


def archive(*files, change=lambda data: data):
    """Of (name or entry, content); `change` has the bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in files:
            # an entry without the time of day: it is part of the test's name, the same in every process
            entry = zipfile.ZipInfo(name) if isinstance(name, str) else name
            z.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return change(buffer.getvalue())


def lying_about_its_size(data):
    """Both records of a file say that it has 10 bytes."""
    return data.replace((50_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))


@pytest.mark.parametrize(
    "data, message",
    [
        (archive(("a", bytes(300_000))), "unpacks to 300,000 bytes; at most"),
        (archive(*((f"f{i}", b"") for i in range(30))), "holds 30 files; at most"),
        (archive(("a", bytes(50_000)), change=lying_about_its_size), "CRC|Bad"),
        (archive(("../a", b"")), "'../a', which leads out"),
        (archive(("/a", b"")), "'/a', which leads out"),
        (archive(("x/../../a", b"")), "which leads out"),
        (archive(("a\\b\n", b"")), "which is no ordinary one"),
        (archive(("\x1b[31m", b"")), "which is no ordinary one"),
        (archive(("a/" * 30 + "b", b"")), "which is no ordinary one"),
        (archive((entry("a", stat.S_IFLNK | 0o777), "/etc/passwd")), "'a', a link or a device"),
        (archive((entry("a", stat.S_IFIFO | 0o777), "")), "'a', a link or a device"),
        (
            archive(("a", b"x"), change=lambda d: d.replace(b"\x14\0\0\0\x08\0", b"\x14\0\x01\0\x08\0")),
            "encrypted|password",
        ),
        (
            archive(("a", b"x"), change=lambda d: d.replace(b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x5d\0")),
            "compression",
        ),
        (archive(("a", b"x"))[:-10], "not a zip file"),
        (b"", "not a zip file"),
        (b"PK\5\6" + b"\xff" * 18, "too many files"),
        (b"PK\6\7" + bytes(16) + b"PK\5\6" + bytes(18), "too many files"),
    ],
)
def test_an_archive_of_any_content_stays_in_its_folder_and_within_its_limits(
    tmp_path, monkeypatch, data, message
):
    monkeypatch.setattr(archives, "MAX_UNPACKED", 100_000)
    monkeypatch.setattr(archives, "MAX_FILES", 20)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(InputError, match=message) as e:
        unpack(tmp_path / "a.zip", tmp_path / "to")
    assert "\n" not in str(e.value) and {path.name for path in tmp_path.iterdir()} <= {"a.zip", "to"}


def test_a_file_that_is_listed_twice_is_an_error_of_the_file_system(tmp_path):
    with pytest.warns(UserWarning):
        (tmp_path / "a.zip").write_bytes(archive(("a", b"x"), ("a", b"y")))
    with pytest.raises(FileExistsError):
        unpack(tmp_path / "a.zip", tmp_path / "to")


def test_damaged_bytes_of_an_archive_are_one_line(tmp_path):
    data = archive(("a/b", bytes(1000)), ("c", random.Random(0).randbytes(300)))
    rng = random.Random(1)
    for i in range(20):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "a.zip").write_bytes(damaged)
        with contextlib.suppress(InputError, OSError):
            unpack(tmp_path / "a.zip", tmp_path / f"to{i}")
    assert zlib.crc32(b"") == 0 and {path.name[:2] for path in tmp_path.iterdir()} <= {"a.", "to"}


def test_what_a_killed_download_left_is_removed_and_a_changed_bundle_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    place = tmp_path / "base/core"
    (place / ".incoming.dead/unpacked").mkdir(parents=True)
    data = zipped(files_of(write_bundle(tmp_path / "bundle")) | {"eval_bundle/sha256": b"of another\n"})
    with answering(OK, b"\r\n", data) as url:
        monkeypatch.setattr(core_bundle, "URL", url)
        bundle = open_bundle()
    assert sorted(path.name for path in place.iterdir()) == [".lock", "eval_bundle"]
    assert open_bundle() == bundle and len(bundle.sha256) == 64
    folder = place / "eval_bundle"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask()
    path = folder / "eval_data/some/next.jsonl"
    text = path.read_text()
    path.write_text(text.replace("zq", "zr"))
    with pytest.raises(InputError, match="no longer those that were downloaded; remove the folder"):
        open_bundle()
    path.write_text(text)
    (folder / "fingerprint").unlink()  # as an earlier version left it
    assert open_bundle() == bundle
    (folder / "sha256").write_text("x\n")
    with pytest.raises(InputError, match="sha256: not a checksum of 64 digits, but 'x'"):
        open_bundle()


def umask():
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- the files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage, message",
    [
        (edit("core.yaml", lambda t: "a: &a [1]\nb: [*a, *a]\nicl_tasks: []"), "core.yaml: no list of tasks"),
        (
            edit(
                "core.yaml",
                lambda t: (
                    "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
                    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
                    + "icl_tasks: *a9"
                ),
            ),
            "YAML without aliases",
        ),
        (edit("core.yaml", lambda t: "[" * 5000), "no list of tasks"),
        (
            edit("core.yaml", lambda t: t + " " * 2**18),
            "core.yaml: too large: core.yaml may have 262,144 bytes",
        ),
        (
            edit("core.yaml", lambda t: t.replace("[2]", "0x" + "f" * 20_000)),
            "task choice: num_fewshot .a value too large to show",
        ),
        (edit("core.yaml", lambda t: "icl_tasks: 0001-01-01 00:00:00 +23:59"), "no list of tasks"),
        (
            edit("core.yaml", lambda t: t.replace('"\\nAnswer: "', "null")),
            "task choice: continuation_delimiter None is not text",
        ),
        (
            edit("core.yaml", lambda t: t.replace("some/choice.jsonl", "../eval_meta_data.csv")),
            "is no path of a file in eval_data/",
        ),
        (edit("core.yaml", lambda t: t.replace("some/choice.jsonl", "some")), "eval_data/some: missing"),
        (edit("eval_meta_data.csv", lambda t: t + "x" * 2**22), "eval_meta_data.csv: too large"),
        (
            edit("eval_meta_data.csv", lambda t: "Eval Task,Random baseline\nchoice"),
            "percent for task choice: ''",
        ),
        (
            edit("eval_data/some/next.jsonl", lambda t: '{"context": "", "continuation": [[["\\ud800"]]]}'),
            "'continuation' is not text",
        ),
        (
            edit(
                "eval_data/some/choice.jsonl",
                lambda t: json.dumps({"query": "", "choices": ["a"] * 2000, "gold": 0}),
            ),
            "'choices' has 2,000 texts, more than 1,000",
        ),
    ],
)
def test_hostile_files_of_a_bundle_are_one_line(tmp_path, damage, message):
    folder = write_bundle(tmp_path / "bundle")
    damage(folder)
    with pytest.raises(InputError, match=message) as e:
        read_bundle(folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600


def test_all_that_tasks_read_together_is_limited(tmp_path, monkeypatch):
    folder = write_bundle(tmp_path / "bundle")
    monkeypatch.setattr(core_bundle, "MAX_BYTES", sum(len(data) for data in files_of(folder).values()))
    read_bundle(folder)
    edit("core.yaml", lambda t: t.replace("some/next", "some/choice"))(folder)
    with pytest.raises(
        InputError, match="eval_data/some/choice.jsonl: too large: .* all that the tasks read"
    ):
        read_bundle(folder)


def test_odd_types_anywhere_in_a_bundle_are_one_line(tmp_path):
    rng = random.Random(0)
    folder = write_bundle(
        tmp_path / "bundle", {label: (*task[:2], task[2][:4]) for label, task in TASKS.items()}
    )
    index = json.loads((folder / "core.yaml").read_text())
    for odd in ODD_TASKS:
        for key in rng.sample(KEYS, 2):
            entries = copy.deepcopy(index)
            entries["icl_tasks"][rng.randrange(3)][key] = odd
            (folder / "core.yaml").write_text(json.dumps(entries))
            refused_in_a_line(read_bundle, folder)
    for odd in ODD_TASKS:
        for entry, _, examples in TASKS.values():
            for key in [*examples[0], None]:
                first = odd if key is None else {**examples[0], key: odd}
                refused_in_a_line(read_example, json.dumps(first), entry["icl_task_type"], "line 1")


def refused_in_a_line(read, *arguments):
    try:
        read(*arguments)
    except InputError as e:
        assert not isinstance(e, Unavailable) and "\n" not in str(e) and len(str(e)) < 600
