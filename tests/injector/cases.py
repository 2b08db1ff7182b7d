"""Cases: a command with a fault at one of its file operations, then the same command again without one."""

import json
import shutil
import threading
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path

from .judge import compare, compare_names, error_lines, hidden, judge_lines, judge_words
from .library import Server
from .scenarios import KINDS, Command, errno_number
from .world import World


@dataclass(frozen=True)
class Case:
    scenario: str
    processes: int = 1
    struck: int = 0  # the rank
    fault: str = "kill"  # or killall, short, stop, an errno's name
    at: int = 1
    times: int = 1
    kinds: str = "files"  # of KINDS

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())

    def command(self, again: bool = False) -> Command:
        return Command(self.scenario, self.processes, again)


@dataclass
class Result:
    case: Case
    where: str = ""  # the operation that the fault struck
    first: dict = field(default_factory=dict)  # of the run with the fault: codes, seconds
    again: dict = field(default_factory=dict)
    line: str = ""  # what the run with the fault said
    findings: list = field(default_factory=list)  # (kind, detail)
    outcome: str = ""  # finished, refused, killed, not struck

    def as_json(self) -> str:
        return json.dumps({**asdict(self), "case": asdict(self.case), "name": self.case.name})


def cases_of(case: Case, trace: list[str], every: int, whole: bool, first=1, last=0) -> list[Case]:
    """The case at the operations of a trace. Of a row of the same operations on the same file (the writes of
    a checkpoint) only the first, the middle and the last, unless `whole`; of these every `every`-th.

    first, last: bounds of the numbers; last 0: none.
    """
    numbers = []
    for _, row in groupby(enumerate(trace, 1), key=lambda item: item[1].split("\t", 1)[1]):
        row = [number for number, _ in row]
        ends = sorted({0, len(row) // 2, len(row) - 1})
        numbers += row if whole else [row[place] for place in ends]
    return [replace(case, at=at) for at in numbers if first <= at <= (last or len(trace))][::every]


def run_case(world: World, server: Server, case: Case, keep: bool = False) -> Result:
    """keep: the folder, work/cases/<name>, also where there are no findings."""
    folder = world.work / "cases" / case.name
    base = world.copy_of_start(server, case.command(), folder)
    _, wanted, wanted_names = world.end_of(server, case.scenario, case.processes)
    result = Result(case)

    fault = {"fault": errno_number(case.fault), "at": case.at, "times": case.times}
    fault["kinds"] = KINDS[case.kinds]
    first = world.run(server, case.command(), base, folder / "first", case.struck, **fault)
    result.first = {"codes": first["codes"], "seconds": round(first["seconds"], 2)}
    result.where = "; ".join(operation(line, base) for line in first["fired"][:3])
    if not first["fired"]:
        result.outcome = "not struck"
    judge_words(result, first, "with the fault", dies=case.fault in ("kill", "killall", "stop"))
    if case.fault not in ("kill", "killall"):
        judge_lines(result, first, base, world.corpus)
    if not any(first["codes"]):
        result.outcome = result.outcome or "finished"
        compare(result, wanted, base, "finished with the fault")

    again = world.run(server, case.command(again=True), base, folder / "again")
    judge_again(result, again, base, wanted, wanted_names)
    if not keep and not result.findings:
        shutil.rmtree(folder)
    return result


def judge_again(result: Result, answer: dict, base: Path, wanted: dict, wanted_names: set):
    """Findings of the command that came after the fault. wanted: see World.end_of."""
    result.again = {"codes": answer["codes"], "seconds": round(answer["seconds"], 2)}
    judge_words(result, answer, "afterwards", dies=False)
    if any(answer["codes"]):
        result.findings.append(("cannot go on", error_lines(answer)[:1] or answer["codes"]))
        return
    compare(result, wanted, base, "after going on")
    compare_names(result, wanted_names, base)


def operation(line: str, base: Path) -> str:
    """A line of a trace, without its number and what differs from run to run."""
    _, kind, path = line.split("\t")
    return f"{kind} {hidden(path.replace(str(base), ''))}"


def run_all(world: World, servers: list[Server], cases: list[Case], on_result, keep: bool = False):
    """Run cases, as many at once as there are servers; on_result(result) is called for one at a time."""
    world.prepare(servers[0], cases)
    waiting = list(reversed(cases))
    lock = threading.Lock()
    errors = []

    def work(server):
        try:
            while True:
                with lock:
                    if not waiting or errors:
                        return
                    case = waiting.pop()
                result = run_case(world, server, case, keep)
                with lock:
                    on_result(result)
        except BaseException as e:  # raised again below
            errors.append(e)

    threads = [threading.Thread(target=work, args=(server,)) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
