"""Call 1 in words: a section for each item, and the aims."""

from train_step import PARTS, shown

from gpu import models
from gpu.models import DENSE, FP8, QUARTER, RECOMPUTE

AIMS = {
    "dense, windows SSSL: MFU": (">=", 0.50),
    "r = d/4: step / dense": ("<=", 0.60),
    "r = d/4: step / fp8 dense": ("<=", 0.62),
    "r = d/4, recompute: peak / dense": ("<=", 0.40),
    "attention of an S layer / of an L layer": ("<=", 0.60),
    "decoding at batch 1, r = d/4: tokens/s / dense": (">=", 1.20),
}


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def milliseconds(seconds: dict) -> str:
    return shown(seconds, 1e3, 3)


def markdown(entries: dict) -> str:
    lines = ["# The ladder, call 1: a training step of d20 on one card", "", *machine_lines(entries), ""]
    sections = {
        "Agreement with the CPU": agreement_lines,
        "Attention alone": attention_lines,
        "Training steps": step_lines,
        "Products by rank": product_lines,
        "The loss by the size of its chunks": loss_lines,
        "The optimizers alone": optimizer_lines,
        "Decoding": decode_lines,
        "Aims": aim_lines,
    }
    lines += [*section_lines(entries, sections), *status_lines(entries, f", {entries['rows']} rows a pass")]
    return "\n".join(lines) + "\n"


def section_lines(entries: dict, sections: dict) -> list[str]:
    """sections: {title: the function that makes its lines, of the entries}. Empty ones are left out."""
    lines = []
    for title, make in sections.items():
        if section := make(entries):
            lines += [f"## {title}", "", *section]
    return lines


def result(entries: dict, name: str):
    """What an item has yielded last; None if nothing."""
    return entries["items"].get(name, {}).get("result")


def machine_lines(entries: dict) -> list[str]:
    machine = result(entries, "machine")
    if not machine:
        return ["The card did not answer."]
    words = [machine["device"], f"torch {machine['torch']}"]
    words += [f"{key} {machine[key]}" for key in ("triton", "cuda", "cudnn") if machine.get(key)]
    if "nvidia-smi" in machine:
        words.append(f"driver, clocks and power limit: {machine['nvidia-smi']}")
    lines = [", ".join(words) + "."]
    if "copy bytes per second" in machine:
        copies = f"copies of {machine['copy bytes per second'] / 1e12:.2f} TB/s, read plus written"
        products = f"products of {machine['matmul flops per second'] / 1e12:,.0f} TFLOP/s"
        lines.append(f"Ceilings: {copies}; {products}. Figures are medians, quartiles in brackets.")
        kernels = [f"{kernel} for a {case}" for case, kernel in machine["attention"].items() if kernel]
        if kernels:
            lines += ["", f"Attention, chosen for compiled training: {', '.join(kernels)}."]
    return lines


def status_lines(entries: dict, setting: str = "") -> list[str]:
    """How long the call took, and which items did not end well. setting: of the whole call."""
    lines = [f"Whole call: {entries['seconds']:.0f} s{setting}."]
    for name, item in entries["items"].items():
        if item["status"] != "ok":
            lines.append(f"- **{name}**: {item['status']}")
    return lines


def agreement_lines(entries: dict) -> list[str]:
    lines = []
    if steps := result(entries, "check: training steps"):
        rows = []
        for entry in steps:
            cells = [f"{entry[key]:.1e}" for key in ("first loss", "gradients", "loss after steps")]
            rows.append([entry["what"], *cells, verdict(entry)])
        heads = [
            "relative difference from float32 on the CPU",
            "first loss",
            "gradients",
            "loss after 5 steps",
        ]
        lines += table([*heads, ""], rows)
    rows = []
    for name, item in entries["items"].items():
        entry = item.get("result")
        if name.startswith("check: ") and isinstance(entry, dict):
            cells = [f"{entry[how]:.1e}" for how in ("eager", "compiled")]
            rows.append([name.removeprefix("check: "), *cells, verdict(entry)])
    if rows:
        lines += table(["error of the gradients, against float64 on the CPU", "eager", "compiled", ""], rows)
    if losses := result(entries, "check: loss"):
        rows = []
        for entry in losses:
            cells = [f"{value:.1e}" for value in entry["relative difference"].values()]
            rows.append([entry["what"], *cells, verdict(entry)])
        lines += table(
            ["loss in chunks, against the plain formula", "loss", "grad x", "grad weight", ""], rows
        )
    return lines


def verdict(entry: dict) -> str:
    return "ok" if entry["ok"] else "DIFFERS"


def attention_lines(entries: dict) -> list[str]:
    kernels = result(entries, "attention")
    if not kernels:
        return []
    rows = []
    for name, entry in sorted(kernels.items()):
        if "missing" in entry:
            rows.append([name, "", "", "", "", entry["missing"]])
            continue
        difference = "" if entry["difference"] is None else f"{entry['difference']:.1e}"
        times = [milliseconds(entry[key]) for key in ("forward", "backward", "whole")]
        label = f"{name} (as in training)" if entry["as in training"] else name
        rows.append([label, *times, shown(entry["flops per second"], 1e-12, 3), difference])
    heads = ["S: a window of half the context; L: all of it", "forward, ms", "backward, ms", "both, ms"]
    return table([*heads, "TFLOP/s on pairs that are seen", "difference"], rows)


def step_lines(entries: dict) -> list[str]:
    lines = []
    peak_flops = (result(entries, "machine") or {}).get("peak flops")
    for number in range(len(models.GROUPS)):
        group = result(entries, f"steps {number + 1}")
        if not group:
            continue
        rows = [step_row(name, group, peak_flops) for name in group["models"]]
        for name, reason in group["failed"].items():
            rows.append([name, reason, *[""] * 14])
        heads = ["", "parameters, M", "tokens/s", "step, ms", *PARTS, "step / dense", "FLOPs / dense"]
        lines += table(
            [*heads, "step / FLOPs", "MFU, %", "HFU, %", "peak, GiB", "predicted", "peak / dense"], rows
        )
        lines += [f"{group['rounds']} rounds of {group['rows']} rows.", ""]
    if lines:
        lines += ["MFU counts the FLOPs of the model, HFU those that the card executes.", ""]
        notes = [f"{name}: {words}" for name, words in models.EXPLANATIONS.items()]
        lines += ["; ".join(notes) + ".", ""]
    return lines


def step_row(name: str, group: dict, peak_flops: float | None) -> list[str]:
    model = group["models"][name]
    ratio = group["ratios"].get(name)
    to_dense = ["", "", ""]
    peak_ratio = ""
    if ratio:
        values = (ratio["seconds"]["step"], ratio["flops"], ratio["step over flops"])
        to_dense = [shown(value, 1, 3) for value in values]
        peak_ratio = shown(ratio["memory"]["peak"], 1, 3)
    shares = ["", ""]
    if peak_flops:
        rate = model["tokens per second"]["median"]
        counted = ("flops/per_token", "flops/executed_per_token")
        shares = [shown(rate * model["accounting"][key], 100 / peak_flops, 3) for key in counted]
    return [
        name,
        shown(model["accounting"]["params/total"], 1e-6),
        f"{model['tokens per second']['median']:,.0f}",
        milliseconds(model["seconds"]["step"]),
        *(shown(model["seconds"][part]["median"], 1e3, 3) for part in PARTS),
        *to_dense,
        *shares,
        shown(model["memory"]["peak"], 1 / 2**30, 3),
        shown(model["predicted peak"], 1 / 2**30, 3),
        peak_ratio,
    ]


def product_lines(entries: dict) -> list[str]:
    rows = []
    for name, entry in (result(entries, "products") or {}).items():
        cells = [milliseconds(entry["seconds"]), shown(entry["flops per second"], 1e-12, 3)]
        rows.append(
            [name, *cells, *(shown(entry[key], 1, 3) for key in ("time to full rank", "flops to full rank"))]
        )
    heads = ["forward and backward", "ms", "TFLOP/s", "time / full rank", "FLOPs / full rank"]
    return table(heads, rows) if rows else []


def loss_lines(entries: dict) -> list[str]:
    rows = []
    for name, entry in (result(entries, "loss chunks") or {}).items():
        label = f"{name} (as in training)" if entry["as in training"] else name
        cells = [shown(entry["flops per second"], 1e-12, 3), shown(entry["peak bytes"], 1 / 2**30, 3)]
        rows.append([label, milliseconds(entry["seconds"]), *cells])
    return table(["loss and its gradients, compiled", "ms", "TFLOP/s", "peak, GiB"], rows) if rows else []


def optimizer_lines(entries: dict) -> list[str]:
    rows = []
    for name, entry in (result(entries, "optimizers") or {}).items():
        rows.append([name, *(milliseconds(entry[part]) for part in ("AdamW", "Muon"))])
    return table(["one update, ms", "AdamW", "Muon"], rows) if rows else []


def decode_lines(entries: dict) -> list[str]:
    rows = []
    for name, entry in (result(entries, "decode") or {}).items():
        if "graphs" in entry:
            texts = [shown(entry[key], 1e3, 3) for key in ("first text", "later texts")]
            graphs = "not recorded"
            rate = "not recorded"
            if entry["graphs"]:
                graphs = shown(entry["graphs"], 1e3, 3)
                rate = f"{1 / entry['graphs']['median']:,.0f}"
            rows.append([name, *texts, graphs, shown(entry["eager"], 1e3, 3), rate])
    heads = ["batch 1, 64 tokens after a prompt of 512: ms a token", "first text", "later texts"]
    return (
        table([*heads, "a step, CUDA graphs", "a step, eager", "tokens/s with graphs"], rows) if rows else []
    )


# ---- the aims ----------------------------------------------------------------------------------------------


def aim_lines(entries: dict) -> list[str]:
    figures = aim_figures(entries)
    rows = []
    for aim, (sign, limit) in AIMS.items():
        figure = figures.get(aim)
        words = "not measured"
        if figure is not None:
            reached = figure >= limit if sign == ">=" else figure <= limit
            words = "reached" if reached else "not reached"
        rows.append([aim, "" if figure is None else f"{figure:.3f}", f"{sign} {limit:.2f}", words])
    return table(["on one H100 or H200", "figure", "aim", ""], rows)


def aim_figures(entries: dict) -> dict[str, float]:
    figures = {}
    aims = list(AIMS)
    groups = [result(entries, f"steps {number + 1}") or {} for number in range(len(models.GROUPS))]
    first, second, _ = ({"models": {}, "ratios": {}} | group for group in groups)
    peak_flops = (result(entries, "machine") or {}).get("peak flops")
    if DENSE in first["models"] and peak_flops:
        figures[aims[0]] = first["models"][DENSE]["flops per second"]["median"] / peak_flops
    if QUARTER in first["ratios"]:
        figures[aims[1]] = first["ratios"][QUARTER]["seconds"]["step"]["median"]
        if FP8 in second["ratios"]:  # both against dense of their own group
            figures[aims[2]] = figures[aims[1]] / second["ratios"][FP8]["seconds"]["step"]["median"]
    if RECOMPUTE in first["ratios"]:
        figures[aims[3]] = first["ratios"][RECOMPUTE]["memory"]["peak"]
    kernels = result(entries, "attention") or {}
    used = {name[0]: entry["whole"] for name, entry in kernels.items() if entry.get("as in training")}
    if len(used) == 2:
        figures[aims[4]] = used["S"]["median"] / used["L"]["median"]
    decoded = result(entries, "decode") or {}
    steps = [decoded.get(name, {}).get("graphs") for name in (DENSE, QUARTER)]
    if all(steps):
        figures[aims[5]] = steps[0]["median"] / steps[1]["median"]
    return figures
