"""Faults at the N-th file operation, by hand.

    python -m tests.injector --scenario train --fault EIO --every 7
    python -m tests.injector --scenario resume --processes 2 --struck 1 --fault EIO ESTALE --kinds reads
    python -m tests.injector --scenario train --cuts 20 --seeds 3   power cuts
    python -m tests.injector --scenario train --list                the operations, by number
    python -m tests.injector --tree /another/checkout …             another version of this program
    python -m tests.injector --summary                              the results, by kind

Results are lines of JSON in WORK/results.jsonl. A case that is there already is not run again. The folder of
a case with findings stays in WORK/cases: base/ as it ended, first.* and again.* what the two commands said.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from .cases import Case, cases_of, run_all
from .library import TREE, missing
from .power_cases import run_cuts, spread
from .scenarios import KINDS, SCENARIOS
from .world import World


def parse():
    parser = argparse.ArgumentParser(
        prog="python -m tests.injector",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tree", type=Path, default=TREE, help="the checkout to test")
    add(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "injector",
        help="folder of runs and results",
    )
    add("--scenario", nargs="+", choices=SCENARIOS, default=["train"])
    add("--processes", type=int, default=1)
    add("--struck", type=int, default=0, help="the rank that the fault strikes")
    add("--fault", nargs="+", default=["kill"], help="kill, killall, short, stop, or errnos such as EIO")
    add("--cuts", type=int, default=0, metavar="N", help="instead of faults, power cuts at N points")
    add("--seeds", type=int, default=0, help="with --cuts: besides the strict variant, this many drawn ones")
    add("--times", type=int, default=1, help="operations in a row that fail; 0 = all from then on")
    add("--kinds", choices=KINDS, default="files", help="operations that count")
    add("--from", type=int, default=1, dest="first")
    add("--to", type=int, default=0, dest="last", help="0 = to the last")
    add("--every", type=int, default=1)
    add("--whole", action="store_true", help="of many writes in a row of one file all, not only three")
    add("--jobs", type=int, default=2, help="cases at once")
    add("--keep", action="store_true", help="keep the folders of all cases")
    add("--list", action="store_true", help="only list the operations")
    add("--summary", action="store_true", help="only summarise the results")
    return parser.parse_args()


def main():
    args = parse()
    if reason := missing():
        sys.exit(reason)
    results = args.work / "results.jsonl"
    if args.summary:
        summarise(results)
        return
    world = World(args.work, args.tree)
    if args.cuts:
        run_power_cuts(args, world, results)
        return
    servers = [world.server() for _ in range(args.jobs)]
    done = set()
    if results.exists():
        done = {json.loads(line)["name"] for line in results.read_text().splitlines()}
    cases = []
    for scenario in args.scenario:
        for fault in args.fault:
            case = Case(scenario, args.processes, args.struck, fault, 1, args.times, args.kinds)
            operations = world.trace(servers[0], case)
            if args.list:
                print("\n".join(operations))
                break
            cases += cases_of(case, operations, args.every, args.whole, args.first, args.last)
    cases = [case for case in cases if case.name not in done]
    print(f"{len(cases)} cases", flush=True)
    with open(results, "a") as f:
        run_all(world, servers, cases, lambda result: show(result, f), args.keep)
    for server in servers:
        server.close()


def show(result, file):
    file.write(result.as_json() + "\n")
    file.flush()
    if result.findings:
        print(result.case.name, result.where, result.first, *result.findings, sep="\n    ", flush=True)


def run_power_cuts(args, world, results):
    server = world.server()
    for scenario in args.scenario:
        for seed in (None, *range(args.seeds)):
            points = spread(args.cuts)
            for result in run_cuts(world, server, scenario, args.processes, points, seed, args.keep):
                with open(results, "a") as f:
                    show(result, f)
    server.close()


def summarise(results: Path):
    groups = defaultdict(list)
    outcomes = defaultdict(int)
    for line in results.read_text().splitlines():
        result = json.loads(line)
        case = result["case"]
        outcomes[case["scenario"], case["processes"], case["fault"], result["outcome"]] += 1
        for kind, detail in result["findings"]:
            where = result["where"].split(";")[0]
            groups[kind, re.sub(r"step_\d+", "step_N", str(detail)[:300])].append((result["name"], where))
    for key, count in sorted(outcomes.items()):
        print(*key, count)
    for (kind, detail), cases in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(cases)} x {kind}: {detail}")
        for name, where in cases[:6]:
            print(f"    {name}: {where}")


if __name__ == "__main__":
    main()
