"""Real runs whose N-th file operation fails or is their last, and whose machine loses power. Slow:

    python -m pytest tests/test_injector.py -m faults                            a sample, about ten minutes on 2 cores
    NANOCHAT_FAULTS=full python -m pytest tests/test_injector.py -m faults       every operation, many hours
    python -m tests.injector --help                                              by hand, with the results as a file

Whatever happens, a run ends with one line, or not at all; and the same command, given again, ends with the weights and
the record of a run that nothing happened to.
"""
import os

import pytest

from injector.cases import Case, cases_of, run_all
from injector.library import TREE, missing
from injector.power_cases import run_cuts, spread
from injector.world import World

pytestmark = [pytest.mark.faults, pytest.mark.skipif(bool(missing()), reason=missing() or "faults can be injected")]
FULL = os.environ.get("NANOCHAT_FAULTS", "") == "full"
JOBS = int(os.environ.get("NANOCHAT_FAULTS_JOBS", "2"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults"), TREE)


@pytest.fixture(scope="module")
def servers(world):
    servers = [world.server() for _ in range(JOBS)]
    yield servers
    for server in servers:
        server.close()


def findings(results) -> str:
    lines = []
    for result in results:
        for kind, detail in result.findings:
            if not kind.startswith("note:"):
                lines.append(f"{result.case.name}, {result.where}: {kind}: {detail}")
    return "\n".join(lines)


def check(world, servers, case: Case, every: int):
    """The case at every `every`-th operation of its command."""
    trace = world.trace(servers[0], case)
    cases = cases_of(case, trace, 1 if FULL else every, whole=FULL)
    results = []
    run_all(world, servers, cases, results.append)
    assert not findings(results), findings(results)
    struck = [result for result in results if result.outcome != "not struck"]
    assert len(struck) >= 0.9 * len(cases), "nearly all faults met an operation"


# scenario, processes, the rank, kinds of operations, every how many of them
@pytest.mark.parametrize("scenario,processes,struck,every", [
    ("train", 1, 0, 5), ("lowrank", 1, 0, 29), ("early", 1, 0, 29), ("resume", 1, 0, 7), ("adapter", 1, 0, 13),
    ("materialize", 1, 0, 7), ("tok_train", 1, 0, 3), ("train", 2, 0, 23), ("resume", 2, 0, 23)])
def test_a_run_that_is_killed_loses_nothing(world, servers, scenario, processes, struck, every):
    fault = "kill" if processes == 1 else "killall"
    check(world, servers, Case(scenario, processes, struck, fault, kinds="changes"), every)


@pytest.mark.parametrize("scenario,processes,struck,every", [
    ("train", 2, 0, 29), ("train", 2, 1, 7), ("resume", 2, 1, 7)])
def test_one_of_two_processes_that_is_killed_takes_the_other_along(world, servers, scenario, processes, struck, every):
    check(world, servers, Case(scenario, processes, struck, "kill", kinds="files"), every)


@pytest.mark.parametrize("scenario,processes,struck,fault,times,every", [
    ("train", 1, 0, "EIO", 1, 9), ("train", 1, 0, "ENOSPC", 0, 17), ("train", 1, 0, "ESTALE", 2, 29),
    ("resume", 1, 0, "EIO", 1, 7), ("resume", 1, 0, "EACCES", 0, 17), ("finished", 1, 0, "EIO", 1, 5),
    ("train", 1, 0, "short", 1, 29), ("early", 1, 0, "EIO", 1, 41), ("adapter", 1, 0, "EIO", 1, 23),
    ("base_eval", 1, 0, "EIO", 1, 11), ("materialize", 1, 0, "EIO", 1, 13), ("report", 1, 0, "EIO", 1, 11),
    ("tok_train", 1, 0, "EIO", 1, 5), ("download", 1, 0, "EIO", 1, 7),
    ("train", 2, 0, "EIO", 1, 37), ("train", 2, 1, "EIO", 1, 11),
    ("resume", 2, 0, "EIO", 1, 29), ("resume", 2, 1, "ESTALE", 1, 7), ("base_eval", 2, 1, "EIO", 1, 13)])
def test_a_file_operation_that_fails_is_one_line(world, servers, scenario, processes, struck, fault, times, every):
    check(world, servers, Case(scenario, processes, struck, fault, times=times, kinds="files"), every)


@pytest.mark.parametrize("scenario,processes", [("train", 1), ("train", 2), ("resume", 1), ("early", 1), ("adapter", 1),
                                                ("tok_train", 1), ("materialize", 1), ("download", 1)])
@pytest.mark.parametrize("seed", [None, 1], ids=["strict", "journal"])
def test_a_power_cut_loses_nothing_that_a_checkpoint_vouches_for(world, servers, scenario, processes, seed):
    """strict: the disk keeps only what was synced; journal: also a part, drawn, of what was not."""
    count = 10 if scenario == "train" and processes == 1 else 4
    points = spread(10**6 if FULL else count)
    results = list(run_cuts(world, servers[0], scenario, processes, points, seed))
    assert len(results) >= min(count, 3)
    assert not findings(results), findings(results)
