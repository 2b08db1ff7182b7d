"""python -m gpu CALL --out FOLDER, with dev/bench and the repository's root in PYTHONPATH: see gpu.sh."""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from gpu import (
    attention,
    correctness,
    decode,
    machine,
    models,
    parts,
    report,
    steps,
    training,
    training_report,
)
from gpu.runner import Item, Report, Setting, run_items
from nanochat import common
from nanochat.arguments import ArgumentParser, whole_number
from nanochat.errors import InputError
from nanochat.files import check_out

SECONDS = 345  # a call of six minutes, with its start
# items that are not timed run side by side; each holds about 9 GiB of the card
TOGETHER = max(1, min(8, (os.cpu_count() or 1) // 2))


def main(argv=None):
    args = flag_parser().parse_args(argv)
    check_out("--out", args.out)
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.call == "1":
        first_call(args, started + args.seconds)
    else:
        second_call(args, started + args.seconds)


def flag_parser():
    parser = ArgumentParser("What only a graphics card can tell about training d20, dense and low rank.")
    add = parser.add_argument
    add("call", choices=["1", "2"], help="1: correctness, times and memory; 2: training")
    add("--out", type=Path, required=True, help="folder for callN.json, callN.md and callN.log")
    add("--device-type", choices=["cuda", "cpu"], default="cuda", help="the device to measure")
    add("--data", type=Path, default=Path("gpu_data"), help="for call 2, the folder that prepare.py made")
    add("--tiny", action="store_true", help="small shapes in float32, to try this program")
    add("--seconds", type=whole_number(1), default=SECONDS, help="the whole call takes no longer than this")
    return parser


def first_call(args, deadline: float):
    results = Report(args.out, "1", report.markdown, {"items": {}, "rows": 0})
    setting = Setting(args.device_type, args.tiny)
    slower = args.seconds / SECONDS

    def run(items: list[Item], together: int = 1):
        run_items(given_time(items, slower), setting, results, deadline, together)

    run([Item("machine", machine.measure, 30)])
    card = report.result(results.entries, "machine") or {}
    rows = models.common_rows(setting, card.get("gib", 80.0))
    setting = Setting(args.device_type, args.tiny, rows)
    results.entries["rows"] = rows
    run(correctness.items(args.tiny), TOGETHER)
    timed = [
        Item("attention", attention.measure, 45),
        Item("steps 1", partial(steps.measure, models.GROUPS[0], 70 * slower), 100),
        Item("steps 2", partial(steps.measure, models.GROUPS[1], 50 * slower), 80),
        Item("steps 3", partial(steps.measure, models.GROUPS[2], 15 * slower), 30),
        Item("decode", decode.measure, 40),
        Item("loss chunks", parts.loss_chunks, 40),
        Item("products", parts.products, 20),
        Item("optimizers", parts.optimizers, 20),
    ]
    run(timed)
    print(report.markdown(results.entries), flush=True)


def second_call(args, deadline: float):
    if not (args.data / "reference.json").is_file():
        raise InputError(f"--data {args.data}: no reference.json there; make the folder with gpu.prepare")
    results = Report(args.out, "2", training_report.markdown, {"items": {}})
    setting = Setting(args.device_type, args.tiny, data=args.data.resolve())

    def run(items: list[Item], together: int):
        run_items(given_time(items, args.seconds / SECONDS), setting, results, deadline, together)

    run([Item("machine", machine.measure, 30)], 1)
    training.second_call(setting, results, deadline, run)
    print(training_report.markdown(results.entries), flush=True)


def given_time(items: list[Item], factor: float) -> list[Item]:
    """Items with their limits in proportion to the time of the call."""
    return [replace(item, seconds=factor * item.seconds) for item in items]


if __name__ == "__main__":
    common.run_script(main)
