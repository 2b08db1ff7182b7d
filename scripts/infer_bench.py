"""What low rank buys at inference: time to read a prompt, tokens a second after it, and memory, over batch sizes.

    python -m scripts.infer_bench --model-tag low --out infer
    python -m scripts.infer_bench --depth 8 --model-dim 512 --attn-rank 0.25 --mlp-rank 0.25 --batch-sizes 1,4,16 --out infer

Up to three forms of one shape: dense, a full-rank model with random weights; factored, the model itself; materialised, its products
BA multiplied out, which is of the dense one's shape, so that a difference between these two is noise. Prefill reads a batch of
prompts; a step decodes one token for each row at the end of the prompt, greedily; forward is the model's forward pass over the
prompts, all logits included, which a token would take if nothing was kept. Peak: the weights and the most bytes of tensors
that prefill and a step hold at one time, the cache included.

In each repeat every form takes its turn, each first in turn. Ratios to dense are taken within a repeat, and are medians with
quartiles: they hold on a machine that does other work too, milliseconds do not.
"""

import itertools
import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nanochat import common, plan
from nanochat.common import ArgumentParser, InputError, number, whole_number
from nanochat.engine import next_logits, prefill, sample
from nanochat.factorize import merge
from nanochat.files import check_out, write_atomic
from nanochat.flag_types import DEEPEST, LONGEST, WIDEST, rank_flag, rank_multiple_flag
from nanochat.flags import build_parser as base_train_parser
from nanochat.gpt import GPT, GPTConfig, LowRankLinear
from nanochat.naming import optional_tag
from nanochat.plan import full_rank
from nanochat.report.page import to_markdown
from nanochat.report.plotting import PALETTE, colour_and_marker, new_figure, png, tidy
from nanochat.whole_ranks import AUTOMATIC
from scripts.generate import open_model
from scripts.layer_bench import bytes_of, digits, list_of, spread, take_turns, with_quartiles

SAMPLE_SECONDS = 0.05


# ---- what is measured -----------------------------------------------------------------------------------------------


def random_model(config: GPTConfig, device) -> GPT:
    """Weights of random numbers: their values do not change the time, and orthogonal ones would take long to make."""
    with torch.device(device):
        model = GPT(config).requires_grad_(False)
        for weight in model.parameters():
            torch.nn.init.uniform_(weight, -0.05, 0.05)
    return model


def forms_of(model: GPT, dtype) -> dict[str, GPT]:
    """{form: model}, weights cast once. A model without low-rank layers has one form; one with silu between its factors has no products."""
    if not any(isinstance(module, LowRankLinear) for module in model.modules()):
        return {"dense": model.to(dtype)}
    forms = {"dense": random_model(full_rank(model.config), model.wte.weight.device), "factored": model}
    if model.config.factor_act == "none":
        forms["materialised"] = merge(model)
    return {name: form.to(dtype) for name, form in forms.items()}


def passes_of(model: GPT, batch: int, prompt_tokens: int, dtype) -> dict:
    """{"prefill", "step", "forward": function} of one form at one batch size."""
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (batch, prompt_tokens), generator=rng).tolist()
    logits, cache = read(model, prompts, dtype)
    first = sample(logits, 0, 0, 1, None)[:, None]

    def step():
        cache.length = prompt_tokens  # always the same one
        return sample(next_logits(model, first, dtype, cache), 0, 0, 1, None).tolist()

    idx = torch.tensor(prompts, device=first.device)
    return {
        "prefill": lambda: read(model, prompts, dtype)[0],
        "step": step,
        "forward": lambda: model(idx, compute_dtype=dtype),
    }


def read(model: GPT, prompts, dtype):
    return prefill(model, prompts, len(prompts[0]) + 1, dtype)


def peak_bytes(function, device) -> int:
    """The most bytes of tensors that a call holds at one time, besides those that were there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    )
    return max(itertools.accumulate(e.nbytes() for e in events), default=0)


def cache_bytes(config: GPTConfig, rows: int, positions: int, dtype) -> int:
    return (
        2
        * len(config.positions)
        * rows
        * positions
        * config.n_kv_head
        * (config.n_embd // config.n_head)
        * dtype.itemsize
    )


def measure(forms: dict[str, GPT], batch: int, prompt_tokens: int, dtype, device, repeats: int) -> dict:
    """All about one batch size: {"batch", "forms": {form: times, ratios to dense, bytes}}."""
    seconds = take_turns(
        {name: passes_of(form, batch, prompt_tokens, dtype) for name, form in forms.items()},
        repeats,
        device,
        SAMPLE_SECONDS,
    )
    case = {"batch": batch, "forms": {}}
    for name, form in forms.items():
        times, dense = (
            {key: np.array(values) for key, values in seconds[which].items()} for which in (name, "dense")
        )

        def once():
            logits, cache = read(form, [[0] * prompt_tokens] * batch, dtype)
            next_logits(form, sample(logits, 0, 0, 1, None)[:, None], dtype, cache)

        weights = bytes_of(form.parameters())
        case["forms"][name] = {
            "prefill seconds": spread(times["prefill"]),
            "step seconds": spread(times["step"]),
            "tokens/s": spread(batch / times["step"]),
            "prefill time / dense": spread(times["prefill"] / dense["prefill"]),
            "tokens/s / dense": spread(dense["step"] / times["step"]),
            "forward / step": spread(times["forward"] / times["step"]),
            "cache_bytes": cache_bytes(form.config, batch, prompt_tokens + 1, dtype),
            "peak_bytes": weights + peak_bytes(once, device),
            "seconds by repeat": seconds[name],
        }
    return case


# ---- what follows from it -------------------------------------------------------------------------------------------


def verdict(ratio: dict, what: str) -> str:
    """ratio: spread of factored over dense, above 1 where factored is faster. A difference counts where both quartiles show it."""
    if ratio["low"] > 1:
        return f"{what}: factored is faster, {with_quartiles(ratio)} times dense"
    if ratio["high"] < 1:
        inverse = {"median": 1 / ratio["median"], "low": 1 / ratio["high"], "high": 1 / ratio["low"]}
        return f"{what}: dense is faster, {with_quartiles(inverse)} times factored"
    return f"{what}: no difference seen, factored is {with_quartiles(ratio)} times dense"


def verdicts(case: dict) -> str:
    found = case["forms"]["factored"]
    prefill = found["prefill time / dense"]
    faster = {"median": 1 / prefill["median"], "low": 1 / prefill["high"], "high": 1 / prefill["low"]}
    return f"Batch {case['batch']}: {verdict(found['tokens/s / dense'], 'decoding')}; {verdict(faster, 'prefill')}."


def sizes(forms: dict[str, GPT], dtype) -> dict:
    return {
        name: {
            "parameters": sum(p.numel() for p in form.parameters()),
            "weights_bytes": bytes_of(form.parameters()),
            "blocks_bytes": bytes_of(form.blocks.parameters()),
            "cache_bytes_of_a_full_context": cache_bytes(form.config, 1, form.config.sequence_len, dtype),
        }
        for name, form in forms.items()
    }


def tables(result: dict) -> list[tuple]:
    """Blocks of nanochat/report/page.py: weights, which is faster, then a line for each batch size and form."""
    MiB = lambda n: digits(n / 2**20)
    dense = result["forms"]["dense"]
    weights = [
        [
            name,
            f"{form['parameters']:,}",
            MiB(form["weights_bytes"]),
            MiB(form["blocks_bytes"]),
            f"{form['weights_bytes'] / dense['weights_bytes']:.2f}",
            f"{form['blocks_bytes'] / dense['blocks_bytes']:.2f}",
            MiB(form["cache_bytes_of_a_full_context"]),
        ]
        for name, form in result["forms"].items()
    ]
    rows = [
        [
            str(case["batch"]),
            name,
            digits(1e3 * f["prefill seconds"]["median"]),
            with_quartiles(f["prefill time / dense"]),
            digits(1e3 * f["step seconds"]["median"]),
            digits(f["tokens/s"]["median"]),
            with_quartiles(f["tokens/s / dense"]),
            with_quartiles(f["forward / step"]),
            MiB(f["cache_bytes"]),
            MiB(f["peak_bytes"]),
        ]
        for case in result["cases"]
        for name, f in case["forms"].items()
    ]
    said = [("paragraph", verdicts(case)) for case in result["cases"] if "factored" in case["forms"]]
    return [
        ("subheading", "Weights"),
        (
            "table",
            [
                "form",
                "parameters",
                "MiB",
                "in the blocks, MiB",
                "/ dense",
                "blocks / dense",
                "cache of one full context, MiB",
            ],
            weights,
            "numbers",
        ),
        ("subheading", "Which is faster"),
        *(said or [("paragraph", "The model has no low-rank layer: there is nothing to compare.")]),
        ("subheading", "Time and memory"),
        (
            "paragraph",
            "Forward over step: how many times as long a token takes if what was computed for the prompt is not kept.",
        ),
        (
            "table",
            [
                "batch",
                "form",
                "prefill, ms",
                "prefill / dense (quartiles)",
                "step, ms",
                "tokens/s",
                "tokens/s / dense (quartiles)",
                "forward / step (quartiles)",
                "cache, MiB",
                "peak, MiB",
            ],
            rows,
            "numbers",
        ),
    ]


def draw(result: dict):
    """Tokens a second and prefill time against batch size, a line a form; what memory holds at the peak."""
    cases = result["cases"]
    names = list(result["forms"])
    batches = [case["batch"] for case in cases]
    fig = new_figure(13, 4.2)
    speed, latency, memory = fig.subplots(1, 3)
    for panel, key, scale, title in (
        (speed, "tokens/s", 1, "decoding: tokens/s of the batch"),
        (latency, "prefill seconds", 1e3, "prefill: ms"),
    ):
        for i, name in enumerate(names):
            found = [case["forms"][name][key] for case in cases]
            errors = [
                [scale * (f["median"] - f["low"]) for f in found],
                [scale * (f["high"] - f["median"]) for f in found],
            ]
            panel.errorbar(
                batches,
                [scale * f["median"] for f in found],
                errors,
                **colour_and_marker(i),
                linewidth=1.5,
                markersize=5,
                elinewidth=1,
                label=name,
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xticks(batches, map(str, batches))
        panel.set_xlabel("batch size")
        panel.set_title(title, fontsize=10.5)
        tidy(panel)
    speed.legend(frameon=False, fontsize=9.5)
    parts = [("weights", PALETTE[0]), ("cache", PALETTE[4]), ("activations", "#999999")]
    bars = [(case["batch"], name) for case in cases for name in names]
    below = np.zeros(len(bars))
    for part, colour in parts:
        heights = []
        for batch, name in bars:
            f = next(case for case in cases if case["batch"] == batch)["forms"][name]
            weights = result["forms"][name]["weights_bytes"]
            rest = max(0, f["peak_bytes"] - weights - f["cache_bytes"])
            heights.append({"weights": weights, "cache": f["cache_bytes"], "activations": rest}[part] / 2**20)
        memory.bar(range(len(bars)), heights, bottom=below, color=colour, label=part, width=0.75)
        below += heights
    memory.set_xticks(
        range(len(bars)), [f"{name}, {batch}" for batch, name in bars], rotation=40, ha="right", fontsize=8.5
    )
    memory.set_title("memory at the peak: MiB, by form and batch size", fontsize=10.5)
    memory.legend(frameon=False, fontsize=9.5)
    tidy(memory)
    return fig


# ---- the command ----------------------------------------------------------------------------------------------------

SHAPE = {
    "depth": 8,
    "model_dim": 512,
    "head_dim": 64,
    "n_kv_head": -1,
    "mlp_ratio": 4.0,
    "vocab_size": 4096,
    "max_seq_len": 1024,
    "window_pattern": "SSSL",
    "attn_rank": 0.25,
    "mlp_rank": 0.25,
    "lm_head_rank": 0,
    "rank_multiple": AUTOMATIC,
    "factor_act": "none",
}  # of a model with random weights


def build_parser():
    parser = ArgumentParser("Prefill, decoding and memory of a model's forms: dense, factored, materialised.")
    add = parser.add_argument
    add(
        "--model-tag",
        type=optional_tag,
        default="",
        help="a run, for its checkpoint; '' = random weights of the shape below",
    )
    add("--step", type=whole_number(0, off=-1), default=-1, help="checkpoint; -1 = the newest")
    for flag, most in (
        ("--depth", DEEPEST),
        ("--model-dim", WIDEST),
        ("--head-dim", WIDEST),
        ("--max-seq-len", LONGEST),
    ):
        add(
            flag,
            type=whole_number(1, most),
            default=None,
            help=f"{SHAPE[flag[2:].replace('-', '_')]} without a run",
        )
    add(
        "--vocab-size",
        type=whole_number(2, LONGEST),
        default=None,
        help=f"{SHAPE['vocab_size']} without a run",
    )
    add(
        "--n-kv-head",
        type=whole_number(1, off=-1),
        default=None,
        help="key/value heads, a divisor of the heads; -1 = as many as heads",
    )
    add(
        "--mlp-ratio",
        type=number(above=0),
        default=None,
        help="hidden width of the MLP / width; 4 without a run",
    )
    add("--window-pattern", default=None, help=f"{SHAPE['window_pattern']} without a run")
    for flag in ("--attn-rank", "--mlp-rank", "--lm-head-rank"):
        add(
            flag,
            type=rank_flag,
            default=None,
            help=f"as of scripts.base_train; {SHAPE[flag[2:].replace('-', '_')]} without a run",
        )
    add("--rank-multiple", type=rank_multiple_flag, default=None, help="as of scripts.base_train")
    add(
        "--factor-act",
        choices=["none", "silu"],
        default=None,
        help="between the factors; silu cannot be materialised",
    )
    add("--batch-sizes", type=list_of(whole_number(1)), default="1,4,16", help="prompts read together")
    add("--prompt-tokens", type=whole_number(1), default=128, help="tokens of each prompt")
    add("--repeats", type=whole_number(1), default=8, help="turns of each form")
    common.device_flags(add, "of weights and activations")
    add("--out", type=Path, default=None, metavar="DIR", help="folder for infer_bench.md, .json and .png")
    return parser


def shape_of(args) -> GPTConfig:
    """The model that the shape's flags describe, by base_train's rules."""
    given = {key: getattr(args, key) for key in SHAPE if getattr(args, key) is not None}
    asked = Namespace(**{**vars(base_train_parser().parse_args([])), **SHAPE, **given})
    return plan.model_config(asked, asked.vocab_size)


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.model_tag and (given := [key for key in SHAPE if getattr(args, key) is not None]):
        raise InputError(
            f"--{given[0].replace('_', '-')}: the run of --model-tag {args.model_tag} has its own; leave one of the two out"
        )
    if args.step >= 0 and not args.model_tag:
        raise InputError(f"--step {args.step}: of which run? name it with --model-tag")
    if args.out:
        check_out("--out", args.out)
    config = None if args.model_tag else shape_of(args)
    device = common.init_process(args.device_type, alone=True).device
    dtype = common.compute_dtype(args.dtype, device.type)
    model, step = (
        (random_model(config, device), None) if config else open_model(args.model_tag, args.step, device)[::2]
    )
    if args.prompt_tokens >= model.config.sequence_len:
        raise InputError(
            f"--prompt-tokens {args.prompt_tokens}: leaves no room in the model's context of {model.config.sequence_len}; "
            f"give at most {model.config.sequence_len - 1}"
        )

    machine = {
        "device": common.device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }
    what = f"run {args.model_tag}, step {step}" if args.model_tag else "random weights"
    about = (
        f"{machine['device']}, {machine['threads']} thread(s), torch {machine['torch']}, {machine['dtype']}; "
        f"{what}: width {model.config.n_embd}, "
        f"{model.config.n_layer} layers, vocabulary {model.config.vocab_size}; prompts of {args.prompt_tokens} tokens, {args.repeats} repeats"
    )
    print(about, flush=True)
    forms = forms_of(model, dtype)
    cases = []
    for batch in args.batch_sizes:
        try:
            with torch.inference_mode():
                cases.append(measure(forms, batch, args.prompt_tokens, dtype, device, args.repeats))
        except RuntimeError as e:  # as torch says it of a GPU's memory and of a processor's
            if "memory" not in str(e):
                raise
            raise InputError(
                f"--batch-sizes {batch}: does not fit into memory; give smaller batches, or fewer --prompt-tokens"
            ) from None
        print(f"measured batch size {batch}", flush=True)

    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    result = {
        "machine": machine,
        "flags": flags,
        "model": asdict(model.config),
        "forms": sizes(forms, dtype),
        "cases": cases,
    }
    blocks = tables(result)
    print("\n" + to_markdown(blocks))
    if args.out:
        write_atomic(args.out / "infer_bench.json", json.dumps(result, indent=1) + "\n")
        write_atomic(args.out / "infer_bench.png", png(draw(result)))
        page = [
            ("heading", "Inference bench"),
            ("paragraph", about),
            (
                "figure",
                "infer_bench.png",
                "Speed over batch sizes, and memory at the peak; bars are quartiles",
            ),
            *blocks,
        ]
        write_atomic(args.out / "infer_bench.md", to_markdown(page))
        print(f"written: {args.out / 'infer_bench.md'}, .json, .png")


if __name__ == "__main__":
    common.run_script(main)
