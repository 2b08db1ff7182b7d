"""Real runs whose N-th file operation fails or is their last, and whose machine loses power. Slow:

    python -m pytest tests/test_injector.py -m faults                        a sample, ten minutes on 2 cores
    NANOCHAT_FAULTS=full python -m pytest tests/test_injector.py -m faults   every operation, many hours
    python -m tests.injector --help                                          by hand, with results in a file

Whatever happens, a run ends with one line, or not at all; and the same command, given again, ends with the
weights and the record of a run that nothing happened to.
"""

import os
import subprocess
from dataclasses import replace

import pytest
from injector.cases import Case, cases_of, run_all
from injector.library import TREE, missing
from injector.power import Disk, cuts
from injector.power_cases import run_cuts, spread
from injector.world import World

FULL = os.environ.get("NANOCHAT_FAULTS", "") == "full"
JOBS = int(os.environ.get("NANOCHAT_FAULTS_JOBS", "2"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    try:
        return World(tmp_path_factory.mktemp("faults"), TREE)
    except subprocess.CalledProcessError as e:
        pytest.skip(f"the C compiler cannot build the library: {e}")


@pytest.fixture(scope="module")
def servers(world):
    servers = [world.server() for _ in range(JOBS)]
    yield servers
    for server in servers:
        server.close()


def fail_for_findings(results):
    lines = []
    for result in results:
        for kind, detail in result.findings:
            if not kind.startswith("note:"):
                lines.append(f"{result.case.name}, {result.where}: {kind}: {detail}")
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


def check(world, servers, case: Case, every: int):
    """The case at every `every`-th operation of its command."""
    trace = world.trace(servers[0], case)
    cases = cases_of(case, trace, 1 if FULL else every, whole=FULL)
    results = []
    run_all(world, servers, cases, results.append)
    fail_for_findings(results)
    struck = [result for result in results if result.outcome != "not struck"]
    share = 0.9 if case.processes == 1 else 0.5  # which of two processes tokenises differs from run to run
    assert len(struck) >= share * len(cases), "nearly all faults met an operation"


# at every how many operations
KILLS = [
    (Case("train"), 7),
    (Case("lowrank"), 37),
    (Case("early"), 23),
    (Case("resume"), 7),
    (Case("adapter"), 17),
    (Case("materialize"), 9),
    (Case("tok_train"), 5),
    (Case("train", 2, fault="killall"), 29),
    (Case("resume", 2, fault="killall"), 17),
]
# what another machine has just written
ERRORS = [
    (Case("train", fault="EIO"), 11),
    (Case("train", fault="ENOSPC", times=0), 23),
    (Case("train", fault="ESTALE", times=2), 37),
    (Case("train", fault="short"), 37),
    (Case("early", fault="EIO"), 47),
    (Case("resume", fault="EIO"), 11),
    (Case("resume", fault="EACCES", times=0), 29),
    (Case("finished", fault="EIO"), 7),
    (Case("adapter", fault="EIO"), 41),
    (Case("base_eval", fault="EIO"), 13),
    (Case("materialize", fault="EIO"), 17),
    (Case("report", fault="EIO"), 17),
    (Case("tok_train", fault="EIO"), 7),
    (Case("download", fault="EIO"), 9),
    (Case("train", 2, 0, fault="EIO"), 41),
    (Case("train", 2, 1, fault="EIO"), 17),
    (Case("resume", 2, 0, fault="EIO"), 37),
    (Case("resume", 2, 1, fault="ESTALE"), 9),
    (Case("base_eval", 2, 1, fault="EIO"), 17),
    (Case("train", fault="EIO", kinds="all"), 97),
    (Case("resume", 2, 1, fault="ENOENT", kinds="all"), 37),
]
ONE_OF_TWO = [(Case("train", 2, 0), 37), (Case("train", 2, 1), 17), (Case("resume", 2, 1), 17)]
# at how many points
CUTS = [
    (Case("train", fault="cut"), 10),
    (Case("train", 2, fault="cut"), 4),
    (Case("resume", fault="cut"), 4),
    (Case("early", fault="cut"), 4),
    (Case("adapter", fault="cut"), 4),
    (Case("tok_train", fault="cut"), 3),
    (Case("materialize", fault="cut"), 4),
    (Case("download", fault="cut"), 4),
]


def each(table):
    """The tests of a table: at every `count`-th operation, or at `count` points."""
    names = [f"{case.scenario}-{case.processes}-{case.struck}-{case.fault}-{case.kinds}" for case, _ in table]
    return pytest.mark.parametrize("case,count", table, ids=names)


@pytest.mark.faults
@each(KILLS)
def test_a_run_that_is_killed_loses_nothing(world, servers, case, count):
    check(world, servers, replace(case, kinds="changes"), count)


@pytest.mark.faults
@each(ONE_OF_TWO)
def test_a_process_that_is_killed_takes_the_other_along(world, servers, case, count):
    check(world, servers, case, count)


@pytest.mark.faults
@each(ERRORS)
def test_a_file_operation_that_fails_is_one_line(world, servers, case, count):
    check(world, servers, case, count)


@pytest.mark.faults
@pytest.mark.parametrize("seed", [None, 1], ids=["strict", "journal"])
@each(CUTS)
def test_a_power_cut_loses_nothing_that_a_checkpoint_vouches_for(world, servers, case, count, seed):
    """strict: the disk keeps only what was synced; journal: also a part, drawn, of what was not."""
    points = spread(10**6 if FULL else count)
    results = list(run_cuts(world, servers[0], case.scenario, case.processes, points, seed))
    assert len(results) >= count
    fail_for_findings(results)


# ---- the simulator itself: quick, in every run of the suite


def change(kind, path="", inode=0, data=b"", target="", offset=0):
    return {"kind": kind, "inode": inode, "offset": offset, "data": data, "path": path, "target": target}


def test_a_cut_keeps_what_was_synced_and_nothing_else(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    (root / "old").write_text("before")
    disk = Disk(root)
    inode = (root / "old").stat().st_ino
    changes = [
        change("create", f"{root}/.new", 7),
        change("write", inode=7, data=b"content"),
        change("fsync", f"{root}/.new", 7),
        change("rename", f"{root}/.new", target=f"{root}/new"),
        change("fsync", str(root), root.stat().st_ino),
        change("write", inode=7, data=b"CON"),
        change("truncate", f"{root}/old", inode),
        change("write", inode=inode, data=b"after"),
        change("unlink", f"{root}/new"),
    ]
    image = tmp_path / "image"
    found = []
    for _ in cuts(disk, changes, [4, 5, 9], image):
        found.append({path.name: path.read_text() for path in image.iterdir()})
    both = {"old": "before", "new": "content"}
    assert found == [{"old": "before"}, both, both]
    disk.write_now(image)
    assert {path.name: path.read_text() for path in image.iterdir()} == {"old": "after"}


def test_a_drawn_cut_keeps_a_part_in_the_order_of_the_calls(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    changes = [
        change("create", f"{root}/a", 7),
        change("write", inode=7, data=b"x" * 9000),
        change("rename", f"{root}/a", target=f"{root}/b"),
    ]
    image = tmp_path / "image"
    names = set()
    contents = set()
    for seed in range(60):
        for _ in cuts(Disk(root), changes, [3], image, seed):
            names.add("".join(path.name for path in image.iterdir()))
            contents |= {path.read_bytes() for path in image.iterdir()}
    assert names == {"", "a", "b"}
    assert contents > {b"", b"x" * 9000} and len(contents) > 4
