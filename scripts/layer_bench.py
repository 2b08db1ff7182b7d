"""Time, memory and FLOPs of each linear layer, dense and at several ranks, and where low rank breaks even.

    python -m scripts.layer_bench --out layer_bench
    python -m scripts.layer_bench --model-dim 1280 --head-dim 128 --tokens 16384,65536 --out layer_bench

Training is the forward and the backward pass over a batch of tokens, with activations in --dtype and weights
in float32 as in scripts.base_train. Decoding is the forward pass of one token. There copies of the layer take
turns, as the layers of a deep model do: the weights come from memory, not from a cache that a whole model
would not fit into. The lm_head gets its tokens in pieces as large as the model's own. Layers of one shape are
measured once and named together. Not measured: what the model saves by computing the first factors of q, k
and v in one product, and what compilation saves.

In each repeat every variant of a layer takes its turn, and each is first in turn. Ratios to dense are taken
within a repeat; shown are medians and quartiles. The ratios hold on a machine that does other work too,
milliseconds do not.
"""

import json
import math
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from nanochat import arguments, common, processes
from nanochat.arguments import ArgumentParser, whole_number
from nanochat.errors import InputError
from nanochat.files import check_out, write_atomic
from nanochat.flag_types import LONGEST, WIDEST, rank_flag
from nanochat.flags import add_rank_multiple
from nanochat.gpt import GPTConfig, make_linear
from nanochat.ops import rows_at_once
from nanochat.rank import on_meta
from nanochat.report import plotting
from nanochat.report.page import to_markdown
from nanochat.whole_ranks import resolve_rank

# a sample is as many calls as take this long, far longer than a clock's tick and a kernel's launch
SAMPLE_SECONDS = 0.005
# decoding: the copies of a layer hold this much together, more than most caches,
COLD_BYTES = 2**27
MOST_COPIES = 64  # but are no more than the layers of a deep model


@dataclass
class Layers:
    """Layers of one shape, and the ranks to measure beside dense."""

    names: str
    in_features: int
    out_features: int
    ranks: list[int]


@dataclass
class Setting:
    """What all measurements have in common."""

    device: torch.device
    dtype: torch.dtype  # of the activations
    repeats: int


def main(argv=None):
    args = flag_parser().parse_args(argv)
    all_layers = [with_ranks(args, *shape) for shape in layer_shapes(model_config(args))]
    if args.out:
        check_out("--out", args.out)
    device = processes.init_process(args.device_type, alone=True).device
    setting = Setting(device, common.compute_dtype(args.dtype, device.type), args.repeats)
    machine = machine_description(setting)
    about = (
        f"{in_words(machine)}; width {args.model_dim}, vocabulary {args.vocab_size}; {args.repeats} repeats"
    )
    print(about, flush=True)

    cases = []
    measured = {}
    batches = [*((tokens, "training") for tokens in args.tokens), (1, "decoding")]
    for tokens, mode in batches:
        for layers in all_layers:
            rows = tokens
            if layers.names == "lm_head":
                rows = min(tokens, rows_at_once(torch.empty(0, device=device), layers.out_features))
            key = layers.names, rows, mode  # two batches may be the same to the head
            if key not in measured:
                measured[key] = measure_or_explain(layers, tokens, rows, mode, setting)
            cases.append({**measured[key], "tokens": tokens})
            done = f"measured {len(cases)} of {len(batches) * len(all_layers)}"
            print(f"{done}: {layers.names}, {title_of(cases[-1])}", flush=True)

    result = {"machine": machine, "flags": flags_as_json(args), "cases": cases}
    blocks = tables(result)
    print("\n" + to_markdown(blocks))
    if args.out:
        caption = (
            "Time of a layer as a ratio to dense, against its rank; bars are quartiles, dotted lines the "
            "ratio of FLOPs"
        )
        heading = [("heading", "Layer bench"), ("paragraph", about), ("figure", "layer_bench.png", caption)]
        write_result(args.out, "layer_bench", result, draw(result), [*heading, *blocks])


# ---- flags -------------------------------------------------------------------------------------------------


def list_of(parse: Callable):
    """argparse type: values that `parse` takes, separated by commas, ascending and each once."""

    def parse_all(text):
        return sorted({parse(part.strip()) for part in text.split(",") if part.strip()}) or parse("")

    return parse_all


def low_rank(text: str) -> float:
    """argparse type."""
    rank = rank_flag(text)
    if not rank:
        raise ArgumentTypeError(
            "0: full rank is measured anyway; give ranks from 1, or fractions between 0 and 1"
        )
    return rank


def flag_parser():
    parser = ArgumentParser("Time, memory and break-even rank of each linear layer of a model by itself.")
    add = parser.add_argument
    add("--model-dim", type=whole_number(1, WIDEST), default=256, help="width")
    add("--head-dim", type=whole_number(1, WIDEST), default=64, help="width of a head")
    add(
        "--n-kv-head",
        type=whole_number(1, off=-1),
        default=-1,
        help="key/value heads, a divisor of the heads; -1 = as many as heads",
    )
    add("--vocab-size", type=whole_number(2, LONGEST), default=4096, help="outputs of the lm_head")
    add(
        "--ranks",
        type=list_of(low_rank),
        default="0.125,0.25,0.33,0.5,0.75,0.95",
        help="whole numbers, or fractions of min(in, out) of each matrix",
    )
    add_rank_multiple(add)
    add(
        "--tokens",
        type=list_of(whole_number(1)),
        default="1024,4096",
        help="tokens in a batch; one token by itself is always measured",
    )
    arguments.device_flags(add, "of the activations; weights are float32")
    add("--repeats", type=whole_number(1), default=20, help="turns of each variant")
    add("--out", type=Path, default=None, metavar="DIR", help="folder for layer_bench.md, .json and .png")
    return parser


def model_config(args) -> GPTConfig:
    if args.model_dim % args.head_dim:
        raise InputError(f"--head-dim {args.head_dim}: does not divide --model-dim {args.model_dim}")
    heads = args.model_dim // args.head_dim
    kv_heads = args.n_kv_head if args.n_kv_head > 0 else heads
    if heads % kv_heads:
        raise InputError(f"--n-kv-head {kv_heads}: must divide the {heads} heads")
    return GPTConfig(
        vocab_size=args.vocab_size, n_layer=1, n_head=heads, n_kv_head=kv_heads, n_embd=args.model_dim
    )


def layer_shapes(config: GPTConfig) -> list[tuple[str, int, int]]:
    """(names, in, out) of the linear layers, those of one shape together; the lm_head, last, by itself."""
    block = on_meta(config).blocks[0]
    attn = block.attn
    layers = {"q": attn.q, "k": attn.k, "v": attn.v, "o": attn.o}
    layers |= {"MLP up": block.mlp.up, "MLP down": block.mlp.down}
    names = {}
    for name, layer in layers.items():
        names.setdefault((layer.in_features, layer.out_features), []).append(name)
    shapes = [(", ".join(group), *shape) for shape, group in names.items()]
    return [*shapes, ("lm_head", config.n_embd, config.vocab_size)]


def with_ranks(args, names: str, in_features: int, out_features: int) -> Layers:
    """The layers with the ranks of --ranks as whole numbers. InputError for ranks that do not fit."""
    ranks = set()
    for rank in args.ranks:
        try:
            ranks.add(resolve_rank(rank, in_features, out_features, args.rank_multiple))
        except ValueError as e:
            raise InputError(f"--ranks: {names}: {e}") from None
    return Layers(names, in_features, out_features, sorted(ranks))


def machine_description(setting: Setting) -> dict:
    return {
        "device": common.device_name(setting.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(setting.dtype).removeprefix("torch."),
    }


def in_words(machine: dict) -> str:
    return "{device}, {threads} thread(s), torch {torch}, {dtype}".format(**machine)


def flags_as_json(args) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


# ---- one layer ---------------------------------------------------------------------------------------------


def make_layer(in_features: int, out_features: int, rank: int, device):
    """Weights uniform in ±0.05: values do not change the time, and orthogonal ones take long to make."""
    with torch.device(device):
        layer = make_linear(in_features, out_features, rank)
        for weight in layer.parameters():
            torch.nn.init.uniform_(weight, -0.05, 0.05)
    return layer


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def kept_bytes(layer, x) -> int:
    """Bytes that the layer's forward pass keeps for the backward pass, its parameters not counted.

    These are the input, the r numbers between the factors and, where the activations are not float32, a copy
    of the weights in their dtype.
    """
    parameters = {p.data_ptr() for p in layer.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)  # alive until the end, so that no address is used twice
    del y
    return sum(kept.values())


def training(in_features: int, out_features: int, rank: int, rows: int, setting: Setting) -> dict:
    """{"layer", "kept_bytes", "passes": {pass: function}} for one batch of `rows` tokens."""
    device = setting.device
    layer = make_layer(in_features, out_features, rank, device)
    x = torch.randn(rows, in_features, device=device).to(setting.dtype).requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y)
    inputs = (x, *layer.parameters())
    return {
        "layer": layer,
        "kept_bytes": kept_bytes(layer, x),
        "passes": {
            "forward": lambda: layer(x),
            "backward": lambda: torch.autograd.grad(y, inputs, grad, retain_graph=True),
        },
    }


def decoding(in_features: int, out_features: int, rank: int, setting: Setting) -> dict:
    """The same for the forward pass of one token, without a gradient."""
    device = setting.device
    layer = make_layer(in_features, out_features, rank, device).requires_grad_(False)
    layers = [layer]
    copies = min(MOST_COPIES, math.ceil(COLD_BYTES / bytes_of(layer.parameters())))
    while len(layers) < copies:
        layers.append(make_layer(in_features, out_features, rank, device).requires_grad_(False))
    x = torch.randn(1, in_features, device=device).to(setting.dtype)
    turns = cycle(layers)
    return {"layer": layer, "kept_bytes": 0, "passes": {"forward": lambda: next(turns)(x)}}


def measure(layers: Layers, rows: int, mode: str, setting: Setting) -> dict:
    """The whole result for the layers of one shape. rows: tokens at once; mode: training or decoding."""
    shape = layers.in_features, layers.out_features
    subjects = {}
    for rank in (0, *layers.ranks):
        if mode == "decoding":
            subjects[rank] = decoding(*shape, rank, setting)
        else:
            subjects[rank] = training(*shape, rank, rows, setting)
    passes = {rank: subject["passes"] for rank, subject in subjects.items()}
    seconds = take_turns(passes, setting.repeats, setting.device, SAMPLE_SECONDS)
    flops_an_entry = 2 if mode == "decoding" else 6
    variants = summary(subjects, seconds, flops_an_entry * rows)
    ratios = [variant["ratio"]["total"] for variant in variants[1:]]
    even = {}
    for bound, quartile in (("median", "median"), ("low", "high"), ("high", "low")):
        # the slower quartile of the times gives the lower break-even rank
        even[bound] = break_even(layers.ranks, [ratio[quartile] for ratio in ratios])
    even["flops"] = layers.in_features * layers.out_features / (layers.in_features + layers.out_features)
    return {
        "layers": layers.names,
        "in": layers.in_features,
        "out": layers.out_features,
        "mode": mode,
        "rows": rows,
        "variants": variants,
        "break-even rank": even,
    }


def measure_or_explain(layers: Layers, tokens: int, rows: int, mode: str, setting: Setting) -> dict:
    """`measure`; InputError where memory does not suffice."""
    try:
        return measure(layers, rows, mode, setting)
    except RuntimeError as e:  # torch's error both for a GPU's memory and for a processor's
        if "memory" not in str(e):
            raise
        raise InputError(
            f"--tokens {tokens}: {layers.names} ({layers.in_features} → {layers.out_features}) "
            "does not fit into memory; give fewer tokens, or smaller layers"
        ) from None


# ---- the clock ---------------------------------------------------------------------------------------------


def seconds_a_call(run: Callable, calls: int, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / calls


def take_turns(runs: dict, repeats: int, device, sample_seconds: float) -> dict:
    """{variant: {pass: function}} -> {variant: {pass: [seconds a call, one a repeat]}}.

    A sample lasts `sample_seconds` or longer.
    """
    calls = {}
    seconds = {}
    for variant, passes in runs.items():
        seconds[variant] = {name: [] for name in passes}
        for name, run in passes.items():
            seconds_a_call(run, 2, device)  # the first may still choose its kernel
            # the fastest: an interrupted call would make every sample short
            fastest = min(seconds_a_call(run, 1, device) for _ in range(3))
            calls[variant, name] = max(1, math.ceil(sample_seconds / fastest))
    order = list(runs)
    for repeat in range(repeats):
        first = repeat % len(order)
        for variant in order[first:] + order[:first]:
            for name, run in runs[variant].items():
                seconds[variant][name].append(seconds_a_call(run, calls[variant, name], device))
    return seconds


# ---- what follows from it ----------------------------------------------------------------------------------


def spread(values) -> dict:
    low, median, high = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high}


def break_even(ranks: list[int], ratios: list[float]) -> dict:
    """{"rank", "is"}: the lowest rank at which the ratio to dense reaches 1, by linear interpolation.

    "is" is "=" or, where it lies outside of the ranks measured, "<" (the lowest) or ">" (the highest).
    ranks: ascending.
    """
    if ratios[0] >= 1:
        return {"rank": ranks[0], "is": "=" if ratios[0] == 1 else "<"}
    for r0, r1, a, b in zip(ranks, ranks[1:], ratios, ratios[1:]):
        if b >= 1:
            return {"rank": r0 + (r1 - r0) * (1 - a) / (b - a), "is": "="}
    return {"rank": ranks[-1], "is": ">"}


def summary(subjects: dict, seconds: dict, flops_an_entry: int) -> list[dict]:
    """One entry a rank, dense (rank 0) first. seconds: of `take_turns`; "total" is the sum of the passes."""
    totals = {}
    parameters = {}
    for rank, passes in seconds.items():
        totals[rank] = passes | {"total": np.sum(list(passes.values()), axis=0).tolist()}
        parameters[rank] = sum(p.numel() for p in subjects[rank]["layer"].parameters())
    entries = []
    for rank, subject in subjects.items():
        ratio = {name: spread(np.divide(values, totals[0][name])) for name, values in totals[rank].items()}
        ratio["flops"] = parameters[rank] / parameters[0]
        ratio["total over flops"] = ratio["total"]["median"] / ratio["flops"]
        entries.append(
            {
                "rank": rank,
                "parameters": parameters[rank],
                "weights_bytes": bytes_of(subject["layer"].parameters()),
                "kept_bytes": subject["kept_bytes"],
                "flops": flops_an_entry * parameters[rank],
                "seconds": {name: spread(values) for name, values in totals[rank].items()},
                "ratio": ratio,
                "seconds by repeat": totals[rank],
            }
        )
    return entries


# ---- table and figure --------------------------------------------------------------------------------------


def digits(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def with_quartiles(values: dict) -> str:
    """'1.50 (1.20-1.60)' of a `spread`."""
    return f"{values['median']:.2f} ({values['low']:.2f}-{values['high']:.2f})"


def rank_in_words(bounds: dict) -> str:
    """'97 (90 to 105)', 'above 243', '230 (201 to above 243)'."""
    words = {"=": "", "<": "below ", ">": "above "}
    low, middle, high = (
        f"{words[bounds[key]['is']]}{bounds[key]['rank']:.0f}" for key in ("low", "median", "high")
    )
    return middle if low == high else f"{middle} ({low} to {high})"


def title_of(case: dict) -> str:
    return "decoding, 1 token" if case["mode"] == "decoding" else f"training, {case['tokens']:,} tokens"


def cells(case: dict, variant: dict) -> dict[str, str]:
    """{column: text} for one rank of one case."""
    seconds = variant["seconds"]
    passes = [name for name in seconds if name != "total"]
    ratio = variant["ratio"]
    pieces = f", {case['rows']:,} at once" if case["rows"] < case["tokens"] else ""
    row = {
        "layer": f"{case['layers']} ({case['in']} → {case['out']}){pieces}",
        "rank": str(variant["rank"] or "dense"),
        "weights, MiB": digits(variant["weights_bytes"] / 2**20),
    }
    if case["mode"] == "training":
        row["kept for backward, MiB"] = digits(variant["kept_bytes"] / 2**20)
    row["MFLOP"] = digits(variant["flops"] / 1e6)
    row |= {f"{name}, ms": digits(1e3 * seconds[name]["median"]) for name in passes}
    if len(passes) > 1:
        row |= {f"{name} / dense": f"{ratio[name]['median']:.2f}" for name in passes}
    row["time / dense (quartiles)"] = with_quartiles(ratio["total"])
    row["FLOPs / dense"] = f"{ratio['flops']:.2f}"
    row["time ratio / FLOP ratio"] = f"{ratio['total over flops']:.2f}"
    if variant["rank"] == 0:  # dense has no ratio to itself
        row |= {column: "" for column in row if "/" in column}
    return row


def tables(result: dict) -> list[tuple]:
    """Blocks of nanochat/report/page.py: the break-even ranks, then a table for each batch size."""
    by_title = {}
    by_layer = {}
    for case in result["cases"]:
        by_title.setdefault(title_of(case), []).append(case)
        by_layer.setdefault(case["layers"], []).append(case)
    even = []
    for layer, cases in by_layer.items():
        ranks = [rank_in_words(case["break-even rank"]) for case in cases]
        by_flops = f"{cases[0]['break-even rank']['flops']:.0f}"
        even.append([layer, f"{cases[0]['in']} → {cases[0]['out']}", *ranks, by_flops])
    blocks = [
        ("subheading", "Break-even rank"),
        (
            "paragraph",
            "Below it low rank takes less time than dense; interpolated between the ranks measured, in "
            "brackets for the quartiles of the time ratio. Above and below: outside of those ranks.",
        ),
        ("table", ["layer", "in → out", *by_title, "by FLOPs"], even, "numbers"),
    ]
    for title, cases in by_title.items():
        rows = [cells(case, variant) for case in cases for variant in case["variants"]]
        blocks.append(("subheading", title[0].upper() + title[1:]))
        blocks.append(("table", list(rows[0]), [list(row.values()) for row in rows], "numbers"))
    return blocks


def draw(result: dict):
    """Time ratio to dense against rank, beside the ratio of FLOPs: a panel a batch size, a line a layer."""
    titles = list(dict.fromkeys(map(title_of, result["cases"])))
    layers = list(dict.fromkeys(case["layers"] for case in result["cases"]))
    columns = min(3, len(titles))
    lines = math.ceil(len(titles) / columns)
    fig = plotting.new_figure(4.2 * columns + 0.6, 3.6 * lines + 0.7)
    panels = fig.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, title in zip(panels, titles):
        panel.axhline(1, color="#666666", linewidth=1)
        for case in result["cases"]:
            if title_of(case) == title:
                draw_case(panel, case, layers.index(case["layers"]))
        panel.set_title(title, fontsize=10.5)
        plotting.tidy(panel)
    panels[0].set_xlim(left=0)  # of all panels; only now, since it ends the scaling to what is drawn
    panels[0].set_ylim(bottom=0)
    for panel in panels[len(titles) :]:
        panel.set_visible(False)
    for panel in panels[: len(titles)]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("rank")
    for panel in panels[::columns]:
        panel.set_ylabel("time, ratio to dense")
    handles, names = panels[0].get_legend_handles_labels()
    handles += panels[0].plot([], [], color="#666666", linestyle=":", linewidth=1.3)
    names.append("dotted: ratio of FLOPs")
    place = {"loc": "outside lower center", "ncols": 3}
    fig.legend(handles, names, frameon=False, fontsize=9.5, **place)
    return fig


def draw_case(panel, case: dict, i: int):
    """One layer at one batch size. i: number of its colour."""
    low_rank = case["variants"][1:]
    ranks = [variant["rank"] for variant in low_rank]
    flops = [variant["ratio"]["flops"] for variant in low_rank]
    colour = plotting.PALETTE[i % len(plotting.PALETTE)]
    panel.plot([0, *ranks], [0, *flops], color=colour, linestyle=":", linewidth=1.3)
    ratios = [variant["ratio"]["total"] for variant in low_rank]
    label = f"{case['layers']} ({case['in']} → {case['out']})"
    draw_spreads(panel, ranks, ratios, i, label)


def draw_spreads(panel, xs: list, spreads: list[dict], i: int, label: str):
    """A line through medians, with quartiles as bars. i: number of its colour and marker."""
    medians = [values["median"] for values in spreads]
    below = [values["median"] - values["low"] for values in spreads]
    above = [values["high"] - values["median"] for values in spreads]
    style = {"linewidth": 1.5, "markersize": 5, "elinewidth": 1, **plotting.colour_and_marker(i)}
    panel.errorbar(xs, medians, [below, above], label=label, **style)


# ---- files -------------------------------------------------------------------------------------------------


def write_result(folder: Path, name: str, result: dict, figure, page: list[tuple]):
    """NAME.json, NAME.png and NAME.md."""
    write_atomic(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_atomic(folder / f"{name}.png", plotting.png(figure))
    write_atomic(folder / f"{name}.md", to_markdown(page))
    print(f"written: {folder / f'{name}.md'}, .json, .png")


if __name__ == "__main__":
    common.run_script(main)
