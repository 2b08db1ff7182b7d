"""Power cuts in a scenario: the disk after each, and whether the same command goes on from it to the end."""

import shutil
from pathlib import Path

from . import outcome
from .cases import Case, Result, judge_again
from .judge import hidden
from .library import Server
from .power import Disk, cuts, read_log
from .scenarios import Command
from .world import World


def logged_run(world: World, server: Server, command: Command, folder: Path):
    """(the Disk before a command, the changes that the command makes: dicts of power.read_log)."""
    base = world.copy_of_start(server, command, folder)
    disk = Disk(base)
    log = folder / "log"
    answer = world.run(server, command, base, folder / "logged", log=log)
    if any(answer["codes"]):
        raise RuntimeError(f"{command} without a fault: {answer}")
    return disk, read_log(log)


def run_cuts(world: World, server: Server, name: str, processes: int, points, seed=None, keep=False):
    """Results of power cuts at the numbers of changes that points(changes) chooses.

    seed: as in power.cuts. RuntimeError if the log does not explain what the command left.
    """
    folder = world.work / "cases" / f"{name}-{processes}-cut-{'strict' if seed is None else seed}"
    disk, changes = logged_run(world, server, Command(name, processes), folder)
    _, wanted, wanted_names = world.end_of(server, name, processes)
    points = points(changes)
    image = folder / "image"
    for point in cuts(disk, changes, points, image, seed):
        case = Case(name, processes, fault="cut" if seed is None else f"cut{seed}", at=point, kinds="changes")
        result = Result(case, where=described(changes[point - 1], folder / "base") if point else "before all")
        if keep:
            shutil.copytree(image, folder / f"image{point}", symlinks=True)
        if point == len(changes) and seed is None:
            check_end(result, image, wanted)
        check_record(result, image, wanted)
        answer = world.run(server, case.command(again=True), image, folder / f"again{point}")
        result.outcome = "finished"
        judge_again(result, answer, image, wanted, wanted_names)
        yield result
    if points[-1:] == [len(changes)]:
        disk.write_now(folder / "now")
        check_log(folder / "now", folder / "base")
    if not keep:
        shutil.rmtree(folder)


def check_end(result, image: Path, wanted: dict):
    """A finding if something is lost although the command had ended. A token cache may be lost."""
    files = {name: value for name, value in wanted["files"].items() if not name.startswith("token_cache/")}
    lines = outcome.differences({**wanted, "files": files}, outcome.of_base(image))
    if lines := [line for line in lines if " None became" not in line]:
        result.findings.append(("lost after the end", [hidden(line) for line in lines[:6]]))


def check_record(result, image: Path, wanted: dict):
    """What the newest intact checkpoint vouches for: the rows of the record up to its step, and two files."""
    for tag, run in wanted["runs"].items():
        folder = image / "runs" / tag
        found = outcome.of_run(folder) if folder.exists() else {"weights": {}}
        intact = [name for name, digest in found["weights"].items() if outcome.is_digest(digest)]
        if not intact:
            continue
        step = int(max(intact)[5:])
        rows = {row: values for row, values in run["record"].items() if int(row) <= step}
        got = {row: values for row, values in found["record"].items() if int(row) <= step}
        if lines := outcome.differences(rows, got, "record"):
            detail = f"checkpoint of step {step}; {len(lines)} of {len(rows)} rows: {hidden(lines[0])[:80]}"
            result.findings.append(("record lost", detail))
        for name in ("config.json", "tokenizer.json"):
            if "unreadable" in outcome.read_json(folder / name):
                result.findings.append(("file lost", f"checkpoint of step {step}; {name}"))


def check_log(now: Path, base: Path):
    """RuntimeError unless the log explains all that is there."""

    def files(folder):
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    ours = files(now)
    real = files(base)
    if differing := [name for name in ours.keys() | real.keys() if ours.get(name) != real.get(name)]:
        raise RuntimeError(f"the log does not explain {differing[:5]}")


def described(change: dict, base: Path) -> str:
    path = change["target"] or change["path"] or f"file {change['inode']}"
    return f"after {change['kind']} {hidden(path.replace(str(base), ''))}"


def spread(count: int):
    """`count` points over the changes that are not writes of data, the end among them."""

    def points(changes):
        places = [number for number, change in enumerate(changes, 1) if change["kind"] != "write"]
        places += [
            number
            for number, change in enumerate(changes, 1)
            if change["kind"] == "write"
            and changes[number : number + 1]
            and changes[number]["kind"] != "write"
        ]
        places = sorted({*places, len(changes)})
        if count >= len(places):
            return places
        return sorted({places[round((i + 1) * len(places) / count) - 1] for i in range(count)})

    return points
