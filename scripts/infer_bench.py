"""Decoding with low rank: time to read a prompt, tokens a second after it, and memory, over batch sizes.

    python -m scripts.infer_bench --model-tag low --out infer
    python -m scripts.infer_bench --depth 8 --model-dim 512 --attn-rank 0.25 --mlp-rank 0.25 --out infer

One shape has up to three forms. Dense: a full-rank model with random weights. Factored: the model itself.
Materialised: its products BA are multiplied out. The last has the shape of dense, so a difference between
these two is noise.

Prefill reads a batch of prompts. A step decodes one token for each row at the end of the prompt, greedily.
Forward is the model's forward pass over the prompts with all logits: the price of a token without a cache.
Steps are also taken at lengths from the prompt's to the context's: on a GPU as CUDA graphs and, "eager",
kernel by kernel.
Peak: the weights, and the most bytes of tensors that prefill and a step hold at one time, the cache included.

In each repeat every form takes its turn, and each is first in turn. Ratios to dense are taken within a
repeat; medians and quartiles are shown. The ratios also hold on a machine that does other work; milliseconds
do not.
"""

import itertools
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanochat import arguments, common, devices, plan, processes
from nanochat.adapters.attach import plain_model
from nanochat.arguments import ArgumentParser, real_number, whole_number
from nanochat.benchmark import (
    Setting,
    explain_out_of_memory,
    flags_as_json,
    growing_seconds,
    machine_description,
    machine_text,
    spread,
    step_after,
    take_turns,
)
from nanochat.engine import prefill, sample, token_decoder
from nanochat.errors import InputError
from nanochat.factorize import merge
from nanochat.files import check_out
from nanochat.flag_types import DEEPEST, LONGEST, WIDEST, comma_separated, rank_flag, rank_multiple_flag
from nanochat.flags import build_parser
from nanochat.gpt import GPT, GPTConfig, LowRankLinear
from nanochat.naming import optional_tag
from nanochat.plan import full_rank
from nanochat.rank import AUTOMATIC
from nanochat.report.bench_page import write_result
from nanochat.report.infer_bench_page import draw_inference, infer_tables
from nanochat.report.page import to_markdown
from nanochat.step_metrics import tensor_bytes
from scripts.generate import open_model

SAMPLE_SECONDS = 0.05  # a sample is as many calls as take this long
LENGTHS = 64  # at most, at which a step is taken as the cache grows
# defaults of the model with random weights
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
}


def main(argv=None):
    args = flag_parser().parse_args(argv)
    check_flags(args)
    # InputError for wrong flags comes before anything is loaded
    config = None if args.model_tag else model_config(args)
    device = processes.init_process(args.device_type, alone=True).device
    setting = Setting(device, devices.compute_dtype(args.dtype, device.type), args.repeats)
    if config:
        model = random_model(config, device)
        origin = "random weights"
    else:
        model, _, step = open_model(args.model_tag, args.step, device)
        origin = f"run {args.model_tag}, step {step}"
    config = model.config
    if args.prompt_tokens >= config.sequence_len:
        raise InputError(
            f"--prompt-tokens {args.prompt_tokens}: leaves no room in the model's context of "
            f"{config.sequence_len}; give at most {config.sequence_len - 1}"
        )

    machine = machine_description(device, setting.dtype)
    description = (
        f"{machine_text(machine)}; {origin}: width {config.n_embd}, {config.n_layer} layers, vocabulary "
        f"{config.vocab_size}; prompts of {args.prompt_tokens} tokens, {args.repeats} repeats"
    )
    print(description, flush=True)
    forms = make_forms(model, setting.dtype)
    cases = []
    for batch in args.batch_sizes:
        remedy = "give smaller batches, or fewer --prompt-tokens"
        with explain_out_of_memory(f"--batch-sizes {batch}: does not fit into memory; {remedy}"):
            cases.append(measure(forms, batch, args.prompt_tokens, setting))
        print(f"measured batch size {batch}", flush=True)

    result = {
        "machine": machine,
        "flags": flags_as_json(args),
        "model": asdict(config),
        "forms": sizes(forms, setting.dtype),
        "cases": cases,
    }
    blocks = infer_tables(result)
    print("\n" + to_markdown(blocks))
    if args.out:
        caption = "Speed over batch sizes, and memory at the peak; bars are quartiles"
        figure = ("figure", "infer_bench.png", caption)
        heading = [("heading", "Inference bench"), ("paragraph", description), figure]
        write_result(args.out, "infer_bench", result, draw_inference(result), [*heading, *blocks])


# ---- flags -------------------------------------------------------------------------------------------------


def flag_parser():
    parser = ArgumentParser("Prefill, decoding and memory of a model's forms: dense, factored, materialised.")
    add = parser.add_argument
    add(
        "--model-tag",
        type=optional_tag,
        default="",
        help="a run, for its checkpoint; '' = random weights of the shape below",
    )
    add("--step", type=whole_number(0, off=-1), default=-1, help="checkpoint; -1 = the newest")
    shape_flags(add)
    add(
        "--batch-sizes", type=comma_separated(whole_number(1)), default="1,4,16", help="prompts read together"
    )
    add("--prompt-tokens", type=whole_number(1), default=128, help="tokens of each prompt")
    add("--repeats", type=whole_number(1), default=8, help="turns of each form")
    arguments.device_flags(add, "of weights and activations")
    add("--out", type=Path, default=None, metavar="DIR", help="folder for infer_bench.md, .json and .png")
    return parser


def shape_flags(add):
    """The shape of the model with random weights. None: the flag was not given."""

    def add_shape(flag, parse, words):
        value = SHAPE[flag[2:].replace("-", "_")]
        add(flag, type=parse, default=None, help=words.format(value))

    add_shape("--depth", whole_number(1, DEEPEST), "layers; {} without a run")
    add_shape("--model-dim", whole_number(1, WIDEST), "width; {} without a run")
    add_shape("--head-dim", whole_number(1, WIDEST), "width of a head; {} without a run")
    add_shape("--max-seq-len", whole_number(1, LONGEST), "context, in tokens; {} without a run")
    add_shape("--vocab-size", whole_number(2, LONGEST), "{} without a run")
    heads = "key/value heads, a divisor of the heads; -1 = as many as heads"
    add_shape("--n-kv-head", whole_number(1, off=-1), heads)
    add_shape("--mlp-ratio", real_number(above=0), "hidden width of the MLP / width; {:g} without a run")
    add_shape("--window-pattern", str, "as of scripts.base_train; {} without a run")
    for flag in ("--attn-rank", "--mlp-rank", "--lm-head-rank"):
        add_shape(flag, rank_flag, "as of scripts.base_train; {} without a run")
    add_shape("--rank-multiple", rank_multiple_flag, "as of scripts.base_train")
    silu = "between the factors; silu cannot be materialised"
    add("--factor-act", choices=["none", "silu"], default=None, help=silu)


def check_flags(args):
    """InputError if the flags do not fit together."""
    shape = shape_from_flags(args)
    if args.model_tag and shape:
        flag = "--" + next(iter(shape)).replace("_", "-")
        raise InputError(
            f"{flag}: the run of --model-tag {args.model_tag} has its own; leave one of the two out"
        )
    if args.step >= 0 and not args.model_tag:
        raise InputError(f"--step {args.step}: of which run? name it with --model-tag")
    if args.out:
        check_out("--out", args.out)


def shape_from_flags(args) -> dict:
    """The flags of the shape that were given."""
    return {key: getattr(args, key) for key in SHAPE if getattr(args, key) is not None}


def model_config(args) -> GPTConfig:
    """The model that the flags of the shape describe, by base_train's rules."""
    defaults = vars(build_parser().parse_args([]))
    flags = Namespace(**{**defaults, **SHAPE, **shape_from_flags(args)})
    return plan.model_config(flags, flags.vocab_size)


# ---- the forms of a model ----------------------------------------------------------------------------------


def random_model(config: GPTConfig, device) -> GPT:
    """Weights uniform in ±0.05: values do not change the time, and orthogonal ones take long to compute."""
    with torch.device(device):
        model = GPT(config).requires_grad_(False)
        for weight in model.parameters():
            torch.nn.init.uniform_(weight, -0.05, 0.05)
    return model


def make_forms(model: GPT, dtype) -> dict[str, GPT]:
    """{form: model}, the weights already in `dtype`.

    A model without low-rank layers has one form. With silu between its factors it cannot be materialised.
    """
    if not any(isinstance(module, LowRankLinear) for module in model.modules()):
        return {"dense": model.to(dtype)}
    forms = {"dense": random_model(full_rank(model.config), model.wte.weight.device), "factored": model}
    if model.config.factor_act == "none":
        forms["materialised"] = merge(plain_model(model))
    return {name: form.to(dtype).requires_grad_(False) for name, form in forms.items()}


def sizes(forms: dict[str, GPT], dtype) -> dict:
    entries = {}
    for name, form in forms.items():
        config = form.config
        entries[name] = {
            "parameters": sum(p.numel() for p in form.parameters()),
            "weights_bytes": tensor_bytes(form.parameters()),
            "blocks_bytes": tensor_bytes(form.blocks.parameters()),
            "cache_bytes_of_a_full_context": cache_bytes(config, 1, config.sequence_len, dtype),
        }
    return entries


# ---- measurements ------------------------------------------------------------------------------------------


def make_passes(model: GPT, batch: int, prompt_tokens: int, dtype) -> dict:
    """{"prefill", "step", "forward": function} of one form at one batch size."""
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (batch, prompt_tokens), generator=rng).tolist()
    logits, cache = read(model, prompts, dtype)
    first = sample(logits, 0, 0, 1, None)
    idx = torch.tensor(prompts, device=first.device)
    return {
        "prefill": lambda: read(model, prompts, dtype)[0],
        "step": partial(step_after, cache, token_decoder(model, cache, dtype), first, prompt_tokens),
        "forward": lambda: model(idx, compute_dtype=dtype),
    }


def read(model: GPT, prompts, dtype):
    return prefill(model, prompts, len(prompts[0]) + 1, dtype)


def spread_lengths(first: int, last: int) -> list[int]:
    """Up to LENGTHS lengths from `first` to `last`, evenly spread."""
    return np.unique(np.linspace(first, last, LENGTHS).astype(int)).tolist()


def peak_bytes(function, device) -> int:
    """The most bytes of tensors that a call holds at one time, without those held before the call."""
    if device.type == "cuda":
        base_bytes = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - base_bytes
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(changes), default=0)


def cache_bytes(config: GPTConfig, rows: int, positions: int, dtype) -> int:
    """Bytes of the keys and values of all layers."""
    kv_width = config.n_kv_head * (config.n_embd // config.n_head)
    return 2 * len(config.positions) * rows * positions * kv_width * dtype.itemsize


def read_and_decode(model: GPT, batch: int, prompt_tokens: int, dtype):
    """A prompt of zeros, and one step after it."""
    logits, cache = read(model, [[0] * prompt_tokens] * batch, dtype)
    token_decoder(model, cache, dtype)(sample(logits, 0, 0, 1, None))


@torch.inference_mode()
def measure(forms: dict[str, GPT], batch: int, prompt_tokens: int, setting: Setting) -> dict:
    """The result for one batch size: {"batch", "forms": {form: times, ratios to dense, bytes}}."""
    dtype = setting.dtype
    passes = {name: make_passes(form, batch, prompt_tokens, dtype) for name, form in forms.items()}
    seconds = take_turns(passes, setting.repeats, setting.device, SAMPLE_SECONDS)
    dense = {key: np.array(values) for key, values in seconds["dense"].items()}
    lengths = spread_lengths(prompt_tokens, forms["dense"].config.sequence_len - 1)
    case = {"batch": batch, "forms": {}, "growing": growing_seconds(forms, batch, lengths, dtype)}
    for name, form in forms.items():
        times = {key: np.array(values) for key, values in seconds[name].items()}
        once = partial(read_and_decode, form, batch, prompt_tokens, dtype)
        case["forms"][name] = {
            "prefill seconds": spread(times["prefill"]),
            "step seconds": spread(times["step"]),
            "tokens/s": spread(batch / times["step"]),
            "prefill time / dense": spread(times["prefill"] / dense["prefill"]),
            "tokens/s / dense": spread(dense["step"] / times["step"]),
            "forward / step": spread(times["forward"] / times["step"]),
            "cache_bytes": cache_bytes(form.config, batch, prompt_tokens + 1, dtype),
            "peak_bytes": tensor_bytes(form.parameters()) + peak_bytes(once, setting.device),
            "seconds by repeat": seconds[name],
        }
    return case


if __name__ == "__main__":
    common.run_script(main)
