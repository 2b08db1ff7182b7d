"""Each linear layer of a model by itself, dense and at several ranks: time, memory, FLOPs, and the rank at which low rank breaks even.

    python -m scripts.layer_bench --out layer_bench
    python -m scripts.layer_bench --model-dim 1280 --head-dim 128 --vocab-size 65536 --tokens 16384,65536 --out layer_bench

Training is the forward and the backward pass over a batch of tokens, in the dtype of the activations, weights in float32 as in
scripts.base_train. Decoding is the forward pass of one token; there copies of the layer take turns, as the layers of a deep model
do, so that the weights come from memory and not from a cache that a whole model would not fit into. The lm_head is given its
tokens in pieces as large as the model's own. Layers of one shape are measured once and named together. Not seen here: what the
model saves by doing the first factors of q, k and v in one product, and what compilation saves.

In each repeat every variant of a layer takes its turn, each first in turn. Ratios to dense are taken within a repeat, and are
medians with quartiles: they hold on a machine that does other work too, milliseconds do not.
"""

import json
import math
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from nanochat import common
from nanochat.common import ArgumentParser, InputError, whole_number
from nanochat.files import check_out, write_atomic
from nanochat.flag_types import LONGEST, WIDEST, rank_flag
from nanochat.flags import add_rank_multiple
from nanochat.gpt import GPTConfig, make_linear
from nanochat.ops import rows_at_once
from nanochat.rank import on_meta
from nanochat.report.page import to_markdown
from nanochat.report.plotting import PALETTE, colour_and_marker, new_figure, png, tidy
from nanochat.whole_ranks import resolve_rank

SAMPLE_SECONDS = 0.005  # a sample is as many calls as take this long: far more than the clock's grain and a kernel's launch
COLD_BYTES = 2**27  # decoding: the copies of a layer hold this much together, more than most caches,
MOST_COPIES = 64  # or are as many as the layers of a deep model


# ---- what is measured -----------------------------------------------------------------------------------------------


def layer_shapes(config: GPTConfig) -> list[tuple[str, int, int]]:
    """(names, in, out) of the linear layers, those of one shape together; the lm_head, last, by itself."""
    model = on_meta(config)
    attn = model.blocks[0].attn
    mlp = model.blocks[0].mlp
    names = {}
    for name, layer in (
        ("q", attn.q),
        ("k", attn.k),
        ("v", attn.v),
        ("o", attn.o),
        ("MLP up", mlp.up),
        ("MLP down", mlp.down),
    ):
        names.setdefault((layer.in_features, layer.out_features), []).append(name)
    return [(", ".join(group), *shape) for shape, group in names.items()] + [
        ("lm_head", config.n_embd, config.vocab_size)
    ]


def make_layer(in_features: int, out_features: int, rank: int, device):
    """Weights of random numbers: their values do not change the time, and orthogonal ones would take long to make."""
    with torch.device(device):
        layer = make_linear(in_features, out_features, rank)
        for weight in layer.parameters():
            torch.nn.init.uniform_(weight, -0.05, 0.05)
    return layer


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def kept_bytes(layer, x) -> int:
    """Bytes that the layer's forward pass keeps for the backward pass, its parameters not counted: the input, the r numbers between
    the factors and, where the activations are not float32, a copy of the weights in their dtype.
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


def training(in_features: int, out_features: int, rank: int, rows: int, dtype, device) -> dict:
    """{"layer", "kept_bytes", "passes": {pass: function}} for one batch of `rows` tokens."""
    layer = make_layer(in_features, out_features, rank, device)
    x = torch.randn(rows, in_features, device=device).to(dtype).requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y)
    wanted = (x, *layer.parameters())
    return {
        "layer": layer,
        "kept_bytes": kept_bytes(layer, x),
        "passes": {
            "forward": lambda: layer(x),
            "backward": lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True),
        },
    }


def decoding(in_features: int, out_features: int, rank: int, dtype, device) -> dict:
    """The same for the forward pass of one token, without a gradient."""
    layers = [make_layer(in_features, out_features, rank, device).requires_grad_(False)]
    copies = min(MOST_COPIES, math.ceil(COLD_BYTES / bytes_of(layers[0].parameters())))
    layers += [
        make_layer(in_features, out_features, rank, device).requires_grad_(False) for _ in range(copies - 1)
    ]
    x = torch.randn(1, in_features, device=device).to(dtype)
    turns = cycle(layers)
    return {"layer": layers[0], "kept_bytes": 0, "passes": {"forward": lambda: next(turns)(x)}}


# ---- the clock ------------------------------------------------------------------------------------------------------


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
    """{variant: {pass: function}} -> {variant: {pass: [seconds a call, one a repeat]}}; a sample lasts `sample_seconds` or longer."""
    calls = {}
    for variant, passes in runs.items():
        for name, run in passes.items():
            seconds_a_call(run, 2, device)  # the first may still choose its kernel
            fastest = min(
                seconds_a_call(run, 1, device) for _ in range(3)
            )  # an interrupted one would make every sample short
            calls[variant, name] = max(1, math.ceil(sample_seconds / fastest))
    seconds = {variant: {name: [] for name in passes} for variant, passes in runs.items()}
    order = list(runs)
    for repeat in range(repeats):
        first = repeat % len(order)
        for variant in order[first:] + order[:first]:
            for name, run in runs[variant].items():
                seconds[variant][name].append(seconds_a_call(run, calls[variant, name], device))
    return seconds


# ---- what follows from it -------------------------------------------------------------------------------------------


def spread(values) -> dict:
    low, median, high = np.quantile(np.asarray(values, dtype=float), (0.25, 0.5, 0.75)).tolist()
    return {"median": median, "low": low, "high": high}


def break_even(ranks: list[int], ratios: list[float]) -> dict:
    """{"rank", "is"}: the lowest rank at which the ratio to dense reaches 1, linear between the ranks measured; "is" is "=" or, where
    it lies outside of them, "<" the lowest or ">" the highest rank. ranks ascending.
    """
    if ratios[0] >= 1:
        return {"rank": ranks[0], "is": "=" if ratios[0] == 1 else "<"}
    for r0, r1, a, b in zip(ranks, ranks[1:], ratios, ratios[1:]):
        if b >= 1:
            return {"rank": r0 + (r1 - r0) * (1 - a) / (b - a), "is": "="}
    return {"rank": ranks[-1], "is": ">"}


def summary(subjects: dict, seconds: dict, flops_an_entry: int) -> list[dict]:
    """One entry a rank, dense (rank 0) first. seconds: of `take_turns`; "total" is the sum of the passes."""
    seconds = {
        rank: passes | {"total": np.sum(list(passes.values()), axis=0).tolist()}
        for rank, passes in seconds.items()
    }
    entries = {
        rank: sum(p.numel() for p in subject["layer"].parameters()) for rank, subject in subjects.items()
    }
    found = []
    for rank, subject in subjects.items():
        ratio = {name: spread(np.divide(values, seconds[0][name])) for name, values in seconds[rank].items()}
        of_flops = entries[rank] / entries[0]
        found.append(
            {
                "rank": rank,
                "parameters": entries[rank],
                "weights_bytes": bytes_of(subject["layer"].parameters()),
                "kept_bytes": subject["kept_bytes"],
                "flops": flops_an_entry * entries[rank],
                "seconds": {name: spread(values) for name, values in seconds[rank].items()},
                "ratio": ratio | {"flops": of_flops, "total over flops": ratio["total"]["median"] / of_flops},
                "seconds by repeat": seconds[rank],
            }
        )
    return found


def measure(
    names: str,
    in_features: int,
    out_features: int,
    ranks: list[int],
    rows: int,
    decodes: bool,
    dtype,
    device,
    repeats: int,
) -> dict:
    """All about the layers of one shape at one batch size."""
    subjects = {
        rank: decoding(in_features, out_features, rank, dtype, device)
        if decodes
        else training(in_features, out_features, rank, rows, dtype, device)
        for rank in (0, *ranks)
    }
    seconds = take_turns(
        {rank: subject["passes"] for rank, subject in subjects.items()}, repeats, device, SAMPLE_SECONDS
    )
    variants = summary(subjects, seconds, (2 if decodes else 6) * rows)
    ratios = [variant["ratio"]["total"] for variant in variants[1:]]
    return {
        "layers": names,
        "in": in_features,
        "out": out_features,
        "mode": "decoding" if decodes else "training",
        "rows": rows,
        "variants": variants,
        "break-even rank": {
            **{
                key: break_even(
                    ranks, [ratio[of] for ratio in ratios]
                )  # a slower quartile breaks even sooner
                for key, of in (("median", "median"), ("low", "high"), ("high", "low"))
            },
            "flops": in_features * out_features / (in_features + out_features),
        },
    }


# ---- table and figure -----------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def with_quartiles(found: dict) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def rank_in_words(found: dict) -> str:
    """'97 (90 to 105)', 'above 243', '230 (201 to above 243)'."""

    def one(bound):
        return {"=": "", "<": "below ", ">": "above "}[bound["is"]] + f"{bound['rank']:.0f}"

    low, middle, high = (one(found[key]) for key in ("low", "median", "high"))
    return middle if low == high else f"{middle} ({low} to {high})"


def title_of(case: dict) -> str:
    return "decoding, 1 token" if case["mode"] == "decoding" else f"training, {case['tokens']:,} tokens"


def cells(case: dict, v: dict) -> dict[str, str]:
    """{column: text} for one rank of one case."""
    seconds = v["seconds"]
    ratio = v["ratio"]
    pieces = f", {case['rows']:,} at once" if case["rows"] < case["tokens"] else ""
    found = {
        "layer": f"{case['layers']} ({case['in']} → {case['out']}){pieces}",
        "rank": str(v["rank"] or "dense"),
        "weights, MiB": digits(v["weights_bytes"] / 2**20),
    }
    if case["mode"] == "training":
        found["kept for backward, MiB"] = digits(v["kept_bytes"] / 2**20)
    found["MFLOP"] = digits(v["flops"] / 1e6)
    found |= {f"{name}, ms": digits(1e3 * seconds[name]["median"]) for name in seconds if name != "total"}
    if len(seconds) > 2:  # more passes than the total
        found |= {f"{name} / dense": f"{ratio[name]['median']:.2f}" for name in seconds if name != "total"}
    found |= {
        "time / dense (quartiles)": with_quartiles(ratio["total"]),
        "FLOPs / dense": f"{ratio['flops']:.2f}",
        "time ratio / FLOP ratio": f"{ratio['total over flops']:.2f}",
    }
    return found if v["rank"] else {column: "" if "/" in column else text for column, text in found.items()}


def tables(result: dict) -> list[tuple]:
    """Blocks of nanochat/report/page.py: the break-even ranks, then a table for each batch size."""
    by_title = {}
    by_layer = {}
    for case in result["cases"]:
        by_title.setdefault(title_of(case), []).append(case)
        by_layer.setdefault(case["layers"], []).append(case)
    even = [
        [
            layer,
            f"{cases[0]['in']} → {cases[0]['out']}",
            *(rank_in_words(case["break-even rank"]) for case in cases),
            f"{cases[0]['break-even rank']['flops']:.0f}",
        ]
        for layer, cases in by_layer.items()
    ]
    blocks = [
        ("subheading", "Break-even rank"),
        (
            "paragraph",
            "Below it low rank takes less time than dense; interpolated between the ranks measured, in brackets for the "
            "quartiles of the time ratio. Above and below: outside of those ranks.",
        ),
        ("table", ["layer", "in → out", *by_title, "by FLOPs"], even, "numbers"),
    ]
    for title, cases in by_title.items():
        rows = [cells(case, variant) for case in cases for variant in case["variants"]]
        blocks += [
            ("subheading", title[0].upper() + title[1:]),
            ("table", list(rows[0]), [list(row.values()) for row in rows], "numbers"),
        ]
    return blocks


def draw(result: dict):
    """Time ratio to dense against rank, a panel for each batch size, a line a layer, beside the ratio of FLOPs."""
    titles = list(dict.fromkeys(map(title_of, result["cases"])))
    layers = list(dict.fromkeys(case["layers"] for case in result["cases"]))
    columns = min(3, len(titles))
    lines = math.ceil(len(titles) / columns)
    fig = new_figure(4.2 * columns + 0.6, 3.6 * lines + 0.7)
    panels = fig.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, title in zip(panels, titles):
        panel.axhline(1, color="#666666", linewidth=1)
        for case in (c for c in result["cases"] if title_of(c) == title):
            i = layers.index(case["layers"])
            low_rank = case["variants"][1:]
            ranks = [v["rank"] for v in low_rank]
            ratios = [v["ratio"]["total"] for v in low_rank]
            errors = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
            panel.plot(
                [0, *ranks],
                [0, *(v["ratio"]["flops"] for v in low_rank)],
                color=PALETTE[i % len(PALETTE)],
                linestyle=":",
                linewidth=1.3,
            )
            panel.errorbar(
                ranks,
                [r["median"] for r in ratios],
                errors,
                **colour_and_marker(i),
                linewidth=1.5,
                markersize=5,
                elinewidth=1,
                label=f"{case['layers']} ({case['in']} → {case['out']})",
            )
        panel.set_title(title, fontsize=10.5)
        tidy(panel)
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
    fig.legend(
        handles,
        [*names, "dotted: ratio of FLOPs"],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9.5,
    )
    return fig


# ---- the command ----------------------------------------------------------------------------------------------------


def list_of(parse: Callable):
    """argparse type: values that `parse` takes, separated by commas, ascending and each once."""

    def parse_all(text):
        return sorted({parse(part.strip()) for part in text.split(",") if part.strip()}) or parse("")

    return parse_all


def low_rank(text: str) -> float:
    if not (rank := rank_flag(text)):
        raise ArgumentTypeError(
            "0: full rank is measured anyway; give ranks from 1, or fractions between 0 and 1"
        )
    return rank


def build_parser():
    parser = ArgumentParser("Time, memory and break-even rank of each linear layer of a model by itself.")
    add = parser.add_argument
    add("--model-dim", type=whole_number(1, WIDEST), default=256, help="width")
    add("--head-dim", type=whole_number(1, WIDEST), default=64)
    add(
        "--n-kv-head",
        type=whole_number(1, off=-1),
        default=-1,
        help="key/value heads, a divisor of the heads; -1 = as many as heads",
    )
    add("--vocab-size", type=whole_number(2, LONGEST), default=4096)
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
    common.device_flags(add, "of the activations; weights are float32")
    add("--repeats", type=whole_number(1), default=20, help="turns of each variant")
    add("--out", type=Path, default=None, metavar="DIR", help="folder for layer_bench.md, .json and .png")
    return parser


def model_of(args) -> GPTConfig:
    if args.model_dim % args.head_dim:
        raise InputError(f"--head-dim {args.head_dim}: does not divide --model-dim {args.model_dim}")
    heads = args.model_dim // args.head_dim
    kv_heads = args.n_kv_head if args.n_kv_head > 0 else heads
    if heads % kv_heads:
        raise InputError(f"--n-kv-head {kv_heads}: must divide the {heads} heads")
    return GPTConfig(
        vocab_size=args.vocab_size, n_layer=1, n_head=heads, n_kv_head=kv_heads, n_embd=args.model_dim
    )


def ranks_of(args, names: str, in_features: int, out_features: int) -> list[int]:
    try:
        shape = in_features, out_features
        return sorted({resolve_rank(rank, *shape, args.rank_multiple) for rank in args.ranks})
    except ValueError as e:
        raise InputError(f"--ranks: {names}: {e}") from None


def main(argv=None):
    args = build_parser().parse_args(argv)
    shapes = [(*shape, ranks_of(args, *shape)) for shape in layer_shapes(model_of(args))]
    if args.out:
        check_out("--out", args.out)
    device = common.init_process(args.device_type, alone=True).device
    dtype = common.compute_dtype(args.dtype, device.type)
    machine = {
        "device": common.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }
    about = (
        f"{machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}, {machine['dtype']}; width {args.model_dim}, "
        f"vocabulary {args.vocab_size}; {args.repeats} repeats"
    )
    print(about, flush=True)

    cases = []
    measured = {}
    batches = [*((tokens, False) for tokens in args.tokens), (1, True)]
    for tokens, decodes in batches:
        for names, in_features, out_features, ranks in shapes:
            rows = (
                min(tokens, rows_at_once(torch.empty(0, device=device), out_features))
                if names == "lm_head"
                else tokens
            )
            key = names, rows, decodes  # two batches may be the same to the head
            try:
                measured[key] = measured.get(key) or measure(
                    names, in_features, out_features, ranks, rows, decodes, dtype, device, args.repeats
                )
            except RuntimeError as e:  # as torch says it of a GPU's memory and of a processor's
                if "memory" not in str(e):
                    raise
                raise InputError(
                    f"--tokens {tokens}: {names} ({in_features} → {out_features}) does not fit into memory; "
                    "give fewer tokens, or smaller layers"
                ) from None
            cases.append({**measured[key], "tokens": tokens})
            print(
                f"measured {len(cases)} of {len(batches) * len(shapes)}: {names}, {title_of(cases[-1])}",
                flush=True,
            )

    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result = {"machine": machine, "flags": flags, "cases": cases}
    blocks = tables(result)
    print("\n" + to_markdown(blocks))
    if args.out:
        write_atomic(args.out / "layer_bench.json", json.dumps(result, indent=1) + "\n")
        write_atomic(args.out / "layer_bench.png", png(draw(result)))
        caption = "Time of a layer as a ratio to dense, against its rank; bars are quartiles, dotted lines the ratio of FLOPs"
        page = [
            ("heading", "Layer bench"),
            ("paragraph", about),
            ("figure", "layer_bench.png", caption),
            *blocks,
        ]
        write_atomic(args.out / "layer_bench.md", to_markdown(page))
        print(f"written: {args.out / 'layer_bench.md'}, .json, .png")


if __name__ == "__main__":
    common.run_script(main)
