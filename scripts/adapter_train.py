r"""Adapt a finished model: train an adapter on it (LoRA, AdaLoRA, IA3), or all of it.

Under --layer-map the model's layers run in another order, or more than once.

    # LoRA of rank 8
    python -m scripts.adapter_train --model-tag d4 --run-tag d4_wiki --data wiki/ --num-iterations 200
    # AdaLoRA on two kinds of matrices
    python -m scripts.adapter_train --model-tag d4 --run-tag d4_ada --adapter adalora --targets 'attn\.[qv]$'
    # 12 positions with the weights of 4 layers
    python -m scripts.adapter_train --model-tag d4 --run-tag d4_12 --layer-map 0,0,0,1,1,1,2,2,2,3,3,3

A run is like those of base_train, and is also evaluated before its first step. Its checkpoints hold the
adapter alone, so the base has to stay where it is. scripts.base_eval, generate and infer_bench take such a
run as it is. scripts.materialize makes a plain model of it.
"""

from argparse import ArgumentTypeError
from dataclasses import dataclass, replace

from nanochat import common, metrics, processes
from nanochat.accounting import account, on_meta
from nanochat.adapters.adalora import Allocator
from nanochat.adapters.attach import AdapterConfig, adapters_of, attach
from nanochat.adapters.loading import ADAPTER, load_bases
from nanochat.adapters.trainable import AdaLoRATrainable, AdapterTrainable
from nanochat.arguments import ArgumentParser, quoted, real_number, whole_number
from nanochat.checkpoint_manager import fitting_together, step_or_newest
from nanochat.continuation import inherit, read_record
from nanochat.errors import InputError
from nanochat.flag_types import layer_map_flag
from nanochat.flags import OLD_DEFAULTS, SHAPE_FLAGS
from nanochat.gpt import GPT, GPTConfig
from nanochat.layer_maps import check_same_shape, parse_map, stacked, takes_two_runs, with_layer_map
from nanochat.memory import flags_in_errors
from nanochat.naming import optional_tag, run_folder, shell_command, tag
from nanochat.optim import Rates, default_matrix_lr
from nanochat.plan import batch_and_horizon, check_schedule, print_plan, take_device_batch
from nanochat.processes import print0
from nanochat.run_files import read_meta, step_folder
from nanochat.run_folder import FINISHED, check_resume, lock_folder
from nanochat.run_setup import RunSpec, start_run
from nanochat.run_text import note_on_text, open_run_text
from nanochat.tokenizer import load_tokenizer
from nanochat.trainable import Trainable
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
from scripts.base_train import end_run, train

# The best of factors of 3 for lora and adalora on a story model (width 256), given 40 small steps on an
# encyclopedia; for ia3 and none one factor below the best, which was the largest tried.
LR = {"lora": 1e-2, "adalora": 3e-2, "ia3": 1e-1, "none": 0.3}


# ---- flags -------------------------------------------------------------------------------------------------


def pattern_list(parse_value):
    """argparse type: 'attn=4,mlp=16' -> the same text, if each value can be read."""

    def parse(text):
        for part in text.split(",") if text else ():
            pattern, equals, value = part.rpartition("=")
            if not (pattern and equals):
                raise ArgumentTypeError(f"{quoted(text)}: write PATTERN=N,… such as attn=4,mlp=16")
            parse_value(value)
        return text

    return parse


def parse_patterns(text: str, parse_value) -> dict:
    """'attn=4,mlp=16' -> {'attn': 4, 'mlp': 16}"""
    values = {}
    for part in text.split(",") if text else ():
        pattern, _, value = part.rpartition("=")
        values[pattern] = parse_value(value)
    return values


def add_run_flags(parser: ArgumentParser):
    add = parser.add_argument_group(
        "Base and text", "The run to adapt, and the text to train on."
    ).add_argument
    add("--model-tag", type=tag, required=True, help="the base: a finished run")
    add("--step", type=whole_number(0, off=-1), default=-1, help="checkpoint of the base; -1 = the newest")
    RUN_TAG.add_to(add)
    add("--data", default="", help="text to train on, as in base_train; '' = the base's text")
    add(
        "--seed",
        type=whole_number(0),
        default=42,
        help="seed of the adapter's first values, of dropout, and of the order of the text",
    )
    WANDB_RUN.add_to(add)


def add_adapter_flags(parser: ArgumentParser):
    add = parser.add_argument_group("Adapter", "What is added to the model and trained.").add_argument
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
        help=r"which matrices are adapted: attn\.[qv]$ or blocks\.[01]\.mlp, for example; '' = all for lora "
        "and adalora, k, v and down for ia3",
    )
    add("--rank", type=whole_number(1), default=8, help="rank (lora), or mean rank at the end (adalora)")
    add("--alpha", type=real_number(), default=16.0, help="the update is scaled by alpha / rank")
    add("--rslora", action="store_true", help="scale by alpha / √rank instead (arXiv 2312.03732)")
    add(
        "--ranks",
        type=pattern_list(whole_number(1)),
        default="",
        metavar="REGEX=N,…",
        help="ranks of the matrices whose names fit a pattern (the first that fits); the others have --rank",
    )
    add(
        "--alphas",
        type=pattern_list(real_number()),
        default="",
        metavar="REGEX=X,…",
        help="the same for --alpha",
    )
    add("--dropout", type=real_number(0, 1), default=0.0, help="dropout of the adapter's input, in training")
    add("--adalora-initial", type=real_number(), default=1.5, help="mean rank at the start / at the end")
    add(
        "--adalora-warmup",
        type=real_number(0, 1),
        default=0.1,
        help="share of the steps before the ranks fall",
    )
    add(
        "--adalora-final",
        type=real_number(0, 1),
        default=0.3,
        help="share of the steps, at the end, in which the ranks stay as they are",
    )
    add("--adalora-every", type=whole_number(1), default=10, help="steps between two choices of the ranks")
    add(
        "--adalora-orthogonality",
        type=real_number(0),
        default=0.1,
        help="weight of ‖PᵀP-I‖² + ‖QQᵀ-I‖² in the loss",
    )
    add(
        "--adalora-per-parameter", action="store_true", help="count the budget in parameters, not in triplets"
    )


def add_layer_flags(parser: ArgumentParser):
    group = parser.add_argument_group("Layers", "Which layers of the base run, and how often.")
    group.add_argument(
        "--layer-map",
        type=layer_map_flag,
        default="",
        help="the base's layer at each position: 0,0,1,1,2,3, solar or mobilellm; with --copied also of two "
        "runs: A:0,B:0,… or goliath; '' = as the base has them",
    )
    group.add_argument(
        "--second-tag",
        type=optional_tag,
        default="",
        metavar="TAG",
        help="the run whose newest checkpoint is B in such a map",
    )
    tying = group.add_mutually_exclusive_group()
    tying.add_argument(
        "--tied",
        dest="tied",
        action="store_true",
        default=True,
        help="positions of one layer share its weights; each has an adapter of its own",
    )
    tying.add_argument("--copied", dest="tied", action="store_false", help="each position has a copy of them")


def add_rate_flags(parser: ArgumentParser):
    add = parser.add_argument_group("Learning rate", "For the adapter, or for the whole model.").add_argument
    add(
        "--lr",
        type=real_number(0, off=-1),
        default=-1,
        help="learning rate (AdamW); with --adapter none a factor on all learning rates of base_train; -1 = "
        + ", ".join(f"{lr:g} for {kind}" for kind, lr in LR.items()),
    )
    add(
        "--weight-decay",
        type=real_number(0),
        default=0.0,
        help="weight decay of matrices; scales do not decay",
    )


def parse(argv=None):
    """The flags, checked as far as they can be without a file."""
    parser = ArgumentParser("Train an adapter, or all of a finished model, on further text.")
    add_run_flags(parser)
    MACHINE_GROUP.add_to(parser)
    add_adapter_flags(parser)
    add_layer_flags(parser)
    add_rate_flags(parser)
    for group in (LENGTH_GROUP, SCHEDULE_GROUP, EVALUATION_GROUP, CORE_GROUP, SAVING_GROUP, CHECK_GROUP):
        group.add_to(parser)
    args = parser.parse_args(argv)
    check_flags(args)
    if args.lr < 0:
        args.lr = LR[args.adapter]
    return args


def check_flags(args):
    """InputError where flags do not fit together."""
    check_resume(args.resume)
    if args.run_tag in (args.model_tag, args.second_tag):
        raise InputError(f"--run-tag {args.run_tag}: is the base itself; choose another tag")
    if args.adapter != "none":
        adapter_config(args)
    if args.adalora_warmup + args.adalora_final >= 1:
        raise InputError(
            f"--adalora-warmup {args.adalora_warmup:g}, --adalora-final {args.adalora_final:g}: together "
            "have to be below 1, so that the budget can fall in between"
        )
    takes_two = takes_two_runs(args.layer_map)
    if takes_two and not args.second_tag:
        raise InputError(
            f"--layer-map {args.layer_map}: takes layers of a second run; name it with --second-tag"
        )
    if args.second_tag and not takes_two:
        raise InputError(
            f"--second-tag {args.second_tag}: no map takes its layers; give --layer-map with B:0, B:1, …, "
            "or goliath"
        )
    if args.second_tag and args.tied:
        raise InputError(f"--layer-map {args.layer_map}: layers of two runs are copied; give --copied")


def adapter_config(args) -> AdapterConfig:
    return AdapterConfig(
        args.adapter,
        args.targets,
        args.rank,
        args.alpha,
        args.dropout,
        args.rslora,
        parse_patterns(args.ranks, int),
        parse_patterns(args.alphas, float),
        args.adalora_initial,
        args.seed,
    )


# ---- the base ----------------------------------------------------------------------------------------------


@dataclass
class Base:
    """The finished run that is adapted, and the second one of a map of two."""

    run: metrics.Run
    config: GPTConfig
    origins: list[dict]  # {"tag", "step", "sha256"} of the checkpoints


def find_base(args) -> Base:
    base = base_run("--model-tag", args.model_tag, args.step)
    if args.second_tag:
        second = base_run("--second-tag", args.second_tag)
        check_same_shape(base.config, second.config, f"--second-tag {args.second_tag}")
        if second.run.config["derived"]["tokenizer_hash"] != base.run.config["derived"]["tokenizer_hash"]:
            raise InputError(f"--second-tag {args.second_tag}: has another tokenizer than {args.model_tag}")
        base.origins += second.origins
    return base


def base_run(flag: str, base: str, step: int = -1) -> Base:
    """InputError unless the run is there, finished and a model of its own."""
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
    return Base(run, config, [{"tag": base, "step": step, "sha256": meta["sha256"]}])


# ---- the model ---------------------------------------------------------------------------------------------


def layers_of_map(args, depth: int) -> tuple[int, ...]:
    """--layer-map for a base of so many layers; () without it."""
    layers = parse_map(args.layer_map, depth) if args.layer_map else ()
    left_out = set(range(depth)) - set(layers)
    if args.adapter == "none" and args.tied and layers and left_out:
        raise InputError(
            f"--layer-map {args.layer_map}: leaves out layer {min(left_out)}, which would stay in the "
            "model and never learn; give --copied"
        )
    return layers


def adapt(args, layers: tuple[int, ...], *bases: GPT) -> GPT:
    """The model under the map, with the adapter at its start; with --adapter none all of it is trained."""
    if args.adapter == "none" and args.tied:
        return with_layer_map(bases[0], layers) if layers else bases[0]
    model = stacked(*bases, layers=layers, tied=args.tied)
    if args.adapter != "none":
        attach(model, ADAPTER, adapter_config(args))
    return model


def allocator_for(args, model: GPT, steps: int) -> Allocator:
    """AdaLoRA's allocator of ranks, for so many steps."""
    return Allocator(
        adapters_of(model, ADAPTER),
        steps,
        round(args.adalora_warmup * steps),
        round(args.adalora_final * steps),
        args.adalora_every,
        per_parameter=args.adalora_per_parameter,
    )


def rates(args, steps: int) -> Rates:
    """Learning rates of --adapter none: base_train's own, times --lr."""
    defaults = RATE_GROUP.defaults() | {"matrix_lr": default_matrix_lr(steps)}
    scaled = {name: args.lr * rate for name, rate in defaults.items()}
    return Rates(**scaled | {"weight_decay": args.weight_decay})


def build_trainable(args, model: GPT, origin: dict, steps: int) -> Trainable:
    """origin: see `adapters.loading.load_adapted`."""
    if args.adapter == "none":
        return Trainable(model, rates(args, steps))
    if args.adapter != "adalora":
        return AdapterTrainable(model, origin, args.lr, args.weight_decay)
    return AdaLoRATrainable(
        model,
        origin,
        args.lr,
        args.weight_decay,
        allocator=allocator_for(args, model, steps),
        orthogonality_weight=args.adalora_orthogonality,
    )


# ---- the run -----------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse(argv)
    inherit(args, read_record(metrics.runs_dir() / args.run_tag), args.run_tag)
    base = find_base(args)
    layers = layers_of_map(args, base.config.n_layer)
    spec = plan_run(args, base, layers)
    if spec is None:  # --dry-run only prints
        return
    origin = spec.derived["origin"]
    run = start_run(spec)  # the processes meet and open the text
    with lock_folder(run) as checkpoint, flags_in_errors(args):
        if checkpoint == FINISHED:
            print0(f"{spec.tag}: already finished, see {run.folder}")
            return
        bases = load_bases(metrics.runs_dir(), origin["bases"], run.world.device, recompute=args.recompute)
        model = adapt(args, layers, *bases)
        trainable = build_trainable(args, model, origin, run.steps)
        stop = train(run, trainable, checkpoint)
    end_run(stop)


def plan_run(args, base: Base, layers: tuple[int, ...]) -> RunSpec | None:
    """What the flags decide, with all checks, before anything is touched. --dry-run prints it: then None."""
    tokenizer = load_tokenizer(metrics.runs_dir() / args.model_tag / "tokenizer.json")
    config = replace(base.config, recompute=args.recompute)
    shape = adapt(args, layers, *(on_meta(config) for _ in base.origins))  # a model without its weights
    args.step = base.origins[0]["step"]
    args.given.add("step")  # -1 now means this checkpoint, and another later
    take_shape_flags(args, base, shape)
    horizon_config = config  # the horizon is the same for layers that are shared and layers that are copied
    if layers:
        horizon_config = replace(config, layer_map=tuple(layer % config.n_layer for layer in layers))
    world_size = processes.process_layout().size
    plan = batch_and_horizon(args, shape, world_size, horizon_config) | {"lr": args.lr}
    take_device_batch(args, plan, world_size)
    check_schedule(args, plan["num_iterations"])
    if args.adapter == "adalora":
        allocator_for(args, shape, plan["num_iterations"])
    costs = account(shape)
    trained = "all of the model is trained"
    if args.adapter != "none":
        costs["params/stored_bits"] = 32 * costs["params/trained"]
        count = len(adapters_of(shape, ADAPTER))
        trained = f"{costs['params/trained']:,} numbers beside {count} matrices"
    print0(f"base: {args.model_tag}, step {args.step}; adapter: {args.adapter}, {trained}")
    if args.dry_run:
        print_plan(shape.config, plan, costs, args)
        return None
    return RunSpec(
        args,
        args.run_tag,
        shape.config,
        plan,
        costs,
        tokenizer,
        lambda: open_text(base.run, args.data),
        tag_flag="--run-tag",
        evaluate_first=True,
        derived={"origin": {"bases": base.origins, "layer_map": list(layers), "tied": args.tied}},
    )


def take_shape_flags(args, base: Base, shape: GPT):
    """The flags of shape as the base has them: the plan and config.json need them too."""
    flags = {**OLD_DEFAULTS, **base.run.config["flags"]}
    values = {name: flags[name] for name in SHAPE_FLAGS if name in flags and name != "layer_map"}
    vars(args).update(values, depth=shape.config.n_layer, max_seq_len=base.config.sequence_len)


def open_text(base: metrics.Run, data: str):
    corpus = open_run_text(base, data)
    if not data and (note := note_on_text(base, corpus)):
        print0(note)
    return corpus


if __name__ == "__main__":
    common.run_script(main)
