"""Adapt a finished model: train an adapter on it (LoRA, AdaLoRA, IA3), or all of it, if wanted with its layers executed more than once.

    python -m scripts.adapter_train --model-tag d4 --run-tag d4_wiki --data wiki/ --num-iterations 200          LoRA of rank 8
    python -m scripts.adapter_train --model-tag d4 --run-tag d4_ada --adapter adalora --rank 4 --targets 'attn\\.[qv]$'
    python -m scripts.adapter_train --model-tag d4 --run-tag d4_12 --layer-map 0,0,0,1,1,1,2,2,2,3,3,3            12 positions, 4 layers' weights
A run as those of base_train, evaluated also before its first step. Its checkpoints hold the adapter alone: the base has to stay where it
is. scripts.base_eval, generate and infer_bench take the run as it is; scripts.materialize makes a plain model of it.
"""

from argparse import ArgumentTypeError
from dataclasses import replace

from nanochat import common, metrics
from nanochat.adapters.adalora import Allocator
from nanochat.adapters.attach import AdapterConfig, adapters_of, attach
from nanochat.adapters.learner import AdapterLearner
from nanochat.adapters.loading import ADAPTER, load_bases
from nanochat.checkpoint_manager import fitting_together, step_or_newest
from nanochat.common import ArgumentParser, InputError, number, print0, quoted, whole_number
from nanochat.continuation import inherit, read_record
from nanochat.flag_types import layer_map_flag
from nanochat.flags import DEFAULTS_BEFORE, SHAPE_FLAGS
from nanochat.gpt import GPT, GPTConfig
from nanochat.layer_maps import check_same_shape, of_two, parse_map, stacked, with_layer_map
from nanochat.naming import optional_tag, run_folder, shell_command, tag
from nanochat.optim import default_matrix_lr
from nanochat.plan import batch_and_horizon, check_schedule, print_plan, take_device_batch
from nanochat.rank import account, on_meta
from nanochat.run_files import read_meta, step_folder
from nanochat.run_text import note_on_text, open_run_text
from nanochat.tokenizer import load_tokenizer
from nanochat.training import START, Learner, check_resume, run
from nanochat.training_flags import (
    CHECK_GROUP,
    CORE_GROUP,
    EVALUATION_GROUP,
    LENGTH_GROUP,
    MACHINE_GROUP,
    RATE_GROUP,
    RUN_TAG,
    SAVING_GROUP,
    SCHEDULE_GROUP,
    WANDB_RUN,
)

# The best of factors of 3 for lora, adalora on a story model (width 256) given 40 small steps on an encyclopedia; for ia3 and none
# one step below the best, which was the largest tried.
LR = {"lora": 1e-2, "adalora": 3e-2, "ia3": 1e-1, "none": 0.3}


# ---- flags ----------------------------------------------------------------------------------------------------------


def by_pattern(value_of):
    """argparse type: 'attn=4,mlp=16' -> the same text, if each value can be read."""

    def parse(text):
        for part in text.split(",") if text else ():
            pattern, equals, value = part.rpartition("=")
            if not (pattern and equals):
                raise ArgumentTypeError(f"{quoted(text)}: write PATTERN=N,… such as attn=4,mlp=16")
            value_of(value)
        return text

    return parse


def patterns(text: str, value_of) -> dict:
    """'attn=4,mlp=16' -> {'attn': 4, 'mlp': 16}"""
    return {
        pattern: value_of(value)
        for pattern, _, value in (part.rpartition("=") for part in text.split(",") if part)
    }


def parse(argv=None):
    """The flags, checked as far as they can be without a file."""
    parser = ArgumentParser("Train an adapter, or all of a finished model, on further text.")
    add = parser.add_argument_group("Base and text", "What is trained, and on what.").add_argument
    add("--model-tag", type=tag, required=True, help="the base: a finished run")
    add("--step", type=whole_number(0, off=-1), default=-1, help="its checkpoint; -1 = the newest")
    RUN_TAG.add_to(add)
    add("--data", default="", help="text to train on, as of base_train; '' = what the base was trained on")
    add(
        "--seed",
        type=whole_number(0),
        default=42,
        help="of the adapter's first numbers, dropout and the order of the data",
    )
    WANDB_RUN.add_to(add)
    MACHINE_GROUP.add_to(parser)
    add = parser.add_argument_group("Adapter", "What is added to the model, and trained.").add_argument
    add(
        "--adapter",
        choices=["lora", "adalora", "ia3", "none"],
        default="lora",
        help="none = every parameter of the model, with no adapter",
    )
    add(
        "--targets",
        default="",
        metavar="REGEX",
        help=r"the matrices that are adapted, such as attn\.[qv]$ or blocks\.[01]\.mlp; '' = all, and of ia3 k, v and down",
    )
    add("--rank", type=whole_number(1), default=8, help="of lora; of adalora the mean at the end")
    add("--alpha", type=number(), default=16.0, help="the update is scaled by alpha / rank")
    add("--rslora", action="store_true", help="by alpha / √rank instead (arXiv 2312.03732)")
    add(
        "--ranks",
        type=by_pattern(whole_number(1)),
        default="",
        metavar="REGEX=N,…",
        help="ranks of the matrices that a pattern finds, of the first that does; of the others --rank",
    )
    add("--alphas", type=by_pattern(number()), default="", metavar="REGEX=X,…", help="likewise")
    add("--dropout", type=number(0, 1), default=0.0, help="of the adapter's input, in training")
    add("--adalora-initial", type=number(), default=1.5, help="ranks at the start, over those at the end")
    add("--adalora-warmup", type=number(0, 1), default=0.1, help="share of the steps before the budget falls")
    add(
        "--adalora-final",
        type=number(0, 1),
        default=0.3,
        help="share of the steps at the end, in which the choice is fixed",
    )
    add("--adalora-every", type=whole_number(1), default=10, help="steps from one choice to the next")
    add(
        "--adalora-orthogonality",
        type=number(0),
        default=0.1,
        help="weight of ‖PᵀP-I‖² + ‖QQᵀ-I‖² in the loss",
    )
    add("--adalora-per-parameter", action="store_true", help="the budget counts parameters, not triplets")
    layers = parser.add_argument_group("Layers", "Which layers of the base run, and how often.")
    add = layers.add_argument
    add(
        "--layer-map",
        type=layer_map_flag,
        default="",
        help="the base's layer at each position: 0,0,1,1,2,3, solar or mobilellm; with --copied also of two runs: A:0,B:0,… or goliath; '' = as the base has them",
    )
    add(
        "--second-tag",
        type=optional_tag,
        default="",
        metavar="TAG",
        help="the run whose newest checkpoint is B in such a map",
    )
    tying = layers.add_mutually_exclusive_group()
    tying.add_argument(
        "--tied",
        dest="tied",
        action="store_true",
        default=True,
        help="positions of one layer share its weights; each has an adapter of its own",
    )
    tying.add_argument("--copied", dest="tied", action="store_false", help="each position has a copy of them")
    add = parser.add_argument_group("Learning rate", "Of the adapter, or of the model.").add_argument
    add(
        "--lr",
        type=number(0, off=-1),
        default=-1,
        help="AdamW's; of none a factor on all learning rates of base_train; -1 = "
        + ", ".join(f"{lr:g} for {kind}" for kind, lr in LR.items()),
    )
    add("--weight-decay", type=number(0), default=0.0, help="of matrices; scales do not decay")
    for group in (LENGTH_GROUP, SCHEDULE_GROUP, EVALUATION_GROUP, CORE_GROUP, SAVING_GROUP, CHECK_GROUP):
        group.add_to(parser)
    args = parser.parse_args(argv)

    check_resume(args.resume)
    if args.run_tag in (args.model_tag, args.second_tag):
        raise InputError(f"--run-tag {args.run_tag}: is the base itself; choose another tag")
    if args.adapter != "none":
        adapter_config(args)
    if args.adalora_warmup + args.adalora_final >= 1:
        raise InputError(
            f"--adalora-warmup {args.adalora_warmup:g}, --adalora-final {args.adalora_final:g}: together have to be below 1, "
            "so that the budget can fall in between"
        )
    if of_two(args.layer_map) and not args.second_tag:
        raise InputError(
            f"--layer-map {args.layer_map}: takes layers of a second run; name it with --second-tag"
        )
    if args.second_tag and not of_two(args.layer_map):
        raise InputError(
            f"--second-tag {args.second_tag}: no map takes its layers; give --layer-map with B:0, B:1, …, or goliath"
        )
    if args.second_tag and args.tied:
        raise InputError(f"--layer-map {args.layer_map}: layers of two runs are copied; give --copied")
    if args.lr < 0:
        args.lr = LR[args.adapter]
    return args


def adapter_config(args) -> AdapterConfig:
    return AdapterConfig(
        args.adapter,
        args.targets,
        args.rank,
        args.alpha,
        args.dropout,
        args.rslora,
        patterns(args.ranks, int),
        patterns(args.alphas, float),
        args.adalora_initial,
        args.seed,
    )


# ---- the base -------------------------------------------------------------------------------------------------------


def base_run(flag: str, base: str, step: int = -1) -> tuple[metrics.Run, dict, GPTConfig]:
    """(run, {"tag", "step", "sha256"} of its checkpoint, its config). InputError unless it is there, finished and a model of its own."""
    folder = run_folder(flag, base)
    run = metrics.load_run(folder)
    if run.summary.get("status") != "finished":
        raise InputError(
            f"{flag} {base}: is not finished; "
            f"continue it with scripts.base_train … {shell_command('--model-tag', base)} "
            "--resume auto"
        )
    step = step_or_newest(folder, step, flag)
    if not step_folder(folder, step).is_dir():
        raise InputError(f"{flag} {base}: no checkpoint of step {step}")
    meta = read_meta(folder, step)
    if "adapter" in meta:
        command = shell_command(
            "python", "-m", "scripts.materialize", "--model-tag", base, "--out-tag", f"{base}_merged"
        )
        raise InputError(
            f"{flag} {base}: is an adapter on {meta['adapter']['origin']['bases'][0]['tag']}; "
            f"make a plain model of it first: {command}"
        )
    if "subspace" in meta:
        raise InputError(
            f"{flag} {base}: its matrices are made of a few numbers (--subspace "
            f"{meta['subspace']['kind']}), there is nothing beside which an adapter could "
            "stand; give a run trained without --subspace"
        )
    with fitting_together(step_folder(folder, step)):
        config = GPTConfig(**meta["model"])
    return run, {"tag": base, "step": step, "sha256": meta["sha256"]}, config


def check_map(args, layers: tuple[int, ...], depth: int):
    if args.adapter == "none" and args.tied and layers and (left_out := set(range(depth)) - set(layers)):
        raise InputError(
            f"--layer-map {args.layer_map}: leaves out layer {min(left_out)}, which would stay in the model and never learn; "
            "give --copied"
        )


def put_together(args, layers: tuple[int, ...], *bases: GPT) -> GPT:
    """The model under the map, with the adapter at its start; with --adapter none all of it is trained."""
    if args.adapter == "none" and args.tied:
        return with_layer_map(bases[0], layers) if layers else bases[0]
    model = stacked(*bases, layers=layers, tied=args.tied)
    if args.adapter != "none":
        attach(model, ADAPTER, adapter_config(args))
    return model


def budget_over(args, model: GPT, steps: int) -> Allocator | None:
    """AdaLoRA's, over so many steps."""
    if args.adapter != "adalora":
        return None
    warmup = round(args.adalora_warmup * steps)
    final = round(args.adalora_final * steps)
    return Allocator(
        adapters_of(model, ADAPTER),
        steps,
        warmup,
        final,
        args.adalora_every,
        per_parameter=args.adalora_per_parameter,
    )


def rates(args, steps: int) -> dict:
    """Learning rates of --adapter none: base_train's own, times --lr."""
    usual = RATE_GROUP.defaults() | {"matrix_lr": default_matrix_lr(steps)}
    return {name: args.lr * rate for name, rate in usual.items()} | {"weight_decay": args.weight_decay}


class WholeModel(Learner):
    """Every parameter of a finished model."""

    starting = True


# ---- the run --------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse(argv)
    inherit(args, read_record(metrics.runs_dir() / args.run_tag), args.run_tag)
    base, of_base, config = base_run("--model-tag", args.model_tag, args.step)
    layers = parse_map(args.layer_map, config.n_layer) if args.layer_map else ()
    check_map(args, layers, config.n_layer)
    origin = {"bases": [of_base], "layer_map": list(layers), "tied": args.tied}
    if args.second_tag:
        second, of_second, theirs = base_run("--second-tag", args.second_tag)
        check_same_shape(config, theirs, f"--second-tag {args.second_tag}")
        if second.config["derived"]["tokenizer_hash"] != base.config["derived"]["tokenizer_hash"]:
            raise InputError(f"--second-tag {args.second_tag}: has another tokenizer than {args.model_tag}")
        origin["bases"].append(of_second)
    tokenizer = load_tokenizer(metrics.runs_dir() / args.model_tag / "tokenizer.json")

    # the model without its weights, the horizon: all that can be wrong is wrong before anything is touched
    config = replace(config, recompute=args.recompute)
    shape = put_together(args, layers, *(on_meta(config) for _ in origin["bases"]))
    args.step = of_base["step"]
    args.given.add("step")  # -1 now means this checkpoint, and another later
    base_flags = {**DEFAULTS_BEFORE, **base.config["flags"]}
    of_shape = {name: base_flags[name] for name in SHAPE_FLAGS if name in base_flags and name != "layer_map"}
    vars(args).update(of_shape, depth=shape.config.n_layer, max_seq_len=config.sequence_len)
    under_map = config  # the horizon is the same for layers that are shared and layers that are copied
    if layers:
        under_map = replace(config, layer_map=tuple(layer % config.n_layer for layer in layers))
    world_size = common.process_layout()[2]
    plan = batch_and_horizon(args, shape, world_size, under_map) | {"lr": args.lr}
    take_device_batch(args, plan, world_size)
    check_schedule(args, plan["num_iterations"])
    budget_over(args, shape, plan["num_iterations"])
    costs = account(shape)
    if args.adapter != "none":
        costs["params/stored_bits"] = 32 * costs["params/trained"]
    print0(
        f"base: {args.model_tag}, step {args.step}; adapter: {args.adapter}"
        + (
            f", {costs['params/trained']:,} numbers beside {len(adapters_of(shape, ADAPTER))} matrices"
            if args.adapter != "none"
            else ", all of the model is trained"
        )
    )
    if args.dry_run:
        return print_plan(shape.config, plan, costs, args)

    def open_text():
        corpus = open_run_text(base, args.data)
        if not args.data and (other := note_on_text(base, corpus)):
            print0(other)
        return corpus

    def build(device) -> Learner:
        model = put_together(
            args, layers, *load_bases(metrics.runs_dir(), origin["bases"], device, recompute=args.recompute)
        )
        if args.adapter == "none":
            return WholeModel(model, rates(args, plan["num_iterations"]))
        return AdapterLearner(
            model,
            origin,
            args.lr,
            args.weight_decay,
            budget_over(args, model, plan["num_iterations"]),
            args.adalora_orthogonality,
        )

    run(
        args,
        args.run_tag,
        shape.config,
        plan,
        costs,
        tokenizer,
        (None, dict(START)),
        build,
        tag_flag="--run-tag",
        open_text=open_text,
        origin=origin,
    )


if __name__ == "__main__":
    common.run_script(main)
