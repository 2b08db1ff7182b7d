"""A checkpoint in another form: factors merged or made by SVD, adapters merged, or a safetensors file.

    # every product BA as one matrix: the same logits
    python -m scripts.materialize --model-tag low --out-tag low_dense
    # the nearest matrices of these ranks, by SVD
    python -m scripts.materialize --model-tag full --attn-rank 64 --mlp-rank 0.25 --out-tag full_svd
    # the smallest ranks that keep 90% of each matrix's Σ s²
    python -m scripts.materialize --model-tag full --energy 0.9 --out-tag full_e90
    # an adapter inside the matrices of its base
    python -m scripts.materialize --model-tag wiki --out-tag wiki_merged
    # weights for dev/plain_forward.py
    python -m scripts.materialize --model-tag low --safetensors low.safetensors

The new run folder is like any other: scripts.base_eval and scripts.report read it, and base_train --init-from
starts from it.
"""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from nanochat import arguments, common, devices, factorize, metrics, processes
from nanochat.accounting import account
from nanochat.adapters.attach import plain_model
from nanochat.adapters.loading import load_model
from nanochat.arguments import real_number, whole_number
from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint, step_or_newest
from nanochat.config import MATRICES
from nanochat.continuation import deciding, differing_keys
from nanochat.errors import InputError
from nanochat.factorize import linear_layers, rank_of
from nanochat.files import check_out, write_atomic
from nanochat.flag_types import matrix_ranks_flag, rank_flag
from nanochat.flags import OLD_DEFAULTS, add_rank_multiple, build_parser
from nanochat.gpt import GPT, SCORE_SCALE, GPTConfig
from nanochat.layer_ranks import check_ranks, named_ranks
from nanochat.loss_eval import evaluate, validation_rows
from nanochat.naming import optional_tag, run_folder, tag
from nanochat.ops import SOFTCAP
from nanochat.rank import AUTOMATIC, resolve_rank, shortest_ranks_text
from nanochat.run_files import complete_summary

TRUNCATION_FLAGS = ("attn_rank", "mlp_rank", "matrix_ranks", "lm_head_rank", "energy")


def main(argv=None):
    args = parse(argv)
    folder = run_folder("--model-tag", args.model_tag)
    run = metrics.load_run(folder)
    step = step_or_newest(folder, args.step)
    if run.config["flags"].get("subspace"):
        raise InputError(
            f"--model-tag {args.model_tag}: trained with --subspace, its matrices are made from a seed "
            "and not stored; take a run without it"
        )
    if args.out_tag:
        out = metrics.runs_dir() / args.out_tag
        lock = common.get_base_dir() / "locks" / f"{args.out_tag}.lock"
        with common.claimed(lock, f"--out-tag {args.out_tag}: {out}"):
            metrics.remove_unfinished_files(out)
            make_run(args, run, folder, step, out)
        folder = out
    if args.safetensors:
        export(folder, step, args.safetensors)


# ---- flags -------------------------------------------------------------------------------------------------


def parse(argv=None):
    args = flag_parser().parse_args(argv)
    check_flags(args)
    return args


def flag_parser():
    parser = arguments.ArgumentParser(
        "Merge the factors of a checkpoint, truncate its matrices by SVD, or export it."
    )
    add = parser.add_argument
    add("--model-tag", type=tag, required=True, help="the run")
    add("--step", type=whole_number(0, off=-1), default=-1, help="checkpoint; -1 = the newest")
    add(
        "--out-tag",
        type=optional_tag,
        default="",
        help="the new run: all factors merged or, with a rank or --energy, truncated",
    )
    add(
        "--attn-rank",
        type=rank_flag,
        default=0,
        help="truncate q, k, v, o to this rank; 0 = leave them; a fraction is of min(in, out)",
    )
    add("--mlp-rank", type=rank_flag, default=0, help="the same for up and down")
    add("--lm-head-rank", type=rank_flag, default=0, help="the same for the output head")
    add(
        "--matrix-ranks",
        type=matrix_ranks_flag,
        default="",
        help="ranks of single matrices instead of their group's, e.g. v=128,down=0.5, or one rank a layer: "
        "v=64/64/128; 0 = leave the matrix",
    )
    add_rank_multiple(add)
    add(
        "--energy",
        type=real_number(0, 1),
        default=None,
        help="truncate each matrix of the blocks to the smallest rank that keeps this share of its squared "
        "singular values",
    )
    add("--data", default="", help="where the run's text is now; '' = where the run read it")
    add(
        "--eval-tokens",
        type=whole_number(0, off=-1),
        default=-1,
        help="validation tokens, before and after; -1 = as many as in the run; 0 = none",
    )
    add("--device-batch-size", type=whole_number(1), default=32, help="rows a pass of the evaluation")
    arguments.device_flags(add, "of the evaluation; weights are float32")
    add(
        "--safetensors",
        type=Path,
        default=None,
        metavar="FILE.safetensors",
        help="write it, with FILE.json beside it: the new run or, without --out-tag, the checkpoint as it is",
    )
    return parser


def check_flags(args):
    """InputError if the flags do not fit together. Sets args.truncates: whether to lower ranks."""
    truncation = [flag for flag in TRUNCATION_FLAGS if getattr(args, flag)]
    args.truncates = bool(truncation)
    first = f"--{truncation[0].replace('_', '-')}" if truncation else ""
    if not (args.out_tag or args.safetensors):
        raise InputError("--out-tag: give the new run's tag, or a file with --safetensors")
    if truncation and not args.out_tag:
        raise InputError(f"{first}: needs --out-tag, the tag of the run with the truncated model")
    if args.out_tag == args.model_tag:
        raise InputError(f"--out-tag {args.out_tag}: is the run itself; choose another tag")
    if args.energy is not None and not 0 < args.energy < 1:
        raise InputError(f"--energy {args.energy:g}: give a share between 0 and 1, such as 0.9")
    if args.energy and set(truncation) - {"energy", "lm_head_rank"}:
        raise InputError(f"--energy: not with {first}: it finds the ranks in the blocks")
    if args.safetensors and args.safetensors.suffix != ".safetensors":
        raise InputError(
            f"--safetensors {args.safetensors}: the name has to end in .safetensors; "
            "the config goes beside it, ending in .json"
        )
    if args.safetensors:
        check_out("--safetensors", args.safetensors, is_file=True)


# ---- a new run ---------------------------------------------------------------------------------------------


def make_run(args, run: metrics.Run, folder: Path, step: int, out: Path):
    """Write the run folder `out` from a checkpoint; its summary, which says finished, comes last."""
    world = processes.init_process(args.device_type, alone=True)
    device = world.device
    dtype = devices.compute_dtype(args.dtype, device.type)
    model, tokenizer, meta = load_model(folder, step, device)
    eval_tokens = args.eval_tokens if args.eval_tokens >= 0 else run.config["flags"]["eval_tokens"]
    truncation = {flag: getattr(args, flag) for flag in (*TRUNCATION_FLAGS, "rank_multiple")}
    source = {"tag": args.model_tag, "step": step, "sha256": meta["sha256"], **truncation}
    if is_finished(out, {"source": source, "eval_tokens": eval_tokens}):
        print(f"{args.out_tag}: already made from {args.model_tag}, see {out}")
        return

    # wrong flags are reported before the text is read
    merged = plain_model(model)  # of an adapter run: the adapter inside the matrices; else the model itself
    check_form(args, model, merged)
    choose = ranks_to_choose(args, merged.config)
    eval_set = None
    if eval_tokens:
        length = model.config.sequence_len
        eval_set = validation_rows(run, tokenizer, length, eval_tokens, args.data, optional=True)

    new, energy_kept = change_matrices(args, model, merged, choose)
    if merged is not model:
        print_adapter(meta["adapter"], model, merged)
    if new is not merged:
        print_matrices(merged, new, energy_kept)

    values = {"step": step}
    if eval_set:
        source_losses = evaluate(model, eval_set, args.device_batch_size, world, dtype)
        losses = evaluate(new, eval_set, args.device_batch_size, world, dtype)
        print_evaluation(args.model_tag, eval_set.tokens, source_losses)
        print_evaluation(args.out_tag, eval_set.tokens, losses)
        values |= losses | {f"source/{key}": value for key, value in source_losses.items()}
    values |= clocks_at(run, step)

    flags = {
        **pretraining_flags(run.config["flags"]),
        **rank_flags(new.config),
        "model_tag": args.out_tag,
        "eval_tokens": eval_tokens,
        "materialized_from": f"{args.model_tag}:{step}",
    }
    derived = {"val_tokens": eval_set.tokens if eval_set else 0, "source": source}
    write_run(out, run, new, tokenizer, flags, derived, values)


def is_finished(out: Path, expected: dict) -> bool:
    """Whether the run exists and is finished. InputError if another run has its name.

    expected: {"source", "eval_tokens"} of the run.
    """
    if not (out / "config.json").exists():
        return False
    existing = metrics.load_run(out)
    flags = existing.config["flags"]
    if "materialized_from" not in flags:
        raise InputError(
            f"--out-tag {out.name}: exists, and is a training run; choose another tag, or remove {out}"
        )
    recorded = {"source": existing.config["derived"]["source"], "eval_tokens": flags["eval_tokens"]}
    if "rank_multiple" not in recorded["source"] and expected["source"]["rank_multiple"] == AUTOMATIC:
        recorded["source"]["rank_multiple"] = AUTOMATIC  # the run is older than the flag: it is accepted
    if differing := differing_keys(recorded, expected):
        raise InputError(
            f"--out-tag {out.name}: exists and is something else: {'; '.join(differing)}; "
            f"choose another tag, or remove {out}"
        )
    if existing.summary["status"] != "finished":
        return False
    complete_summary(out)
    return True


def check_form(args, model: GPT, merged: GPT):
    """InputError if the model cannot be merged or truncated, or if there is nothing to merge."""
    try:
        if args.truncates or merged is model:
            factorize.check_linear(merged)
    except ValueError as e:
        raise InputError(
            f"--model-tag {args.model_tag}: {e}; it can be neither merged nor truncated"
        ) from None
    if not args.truncates and merged is model and not any(map(rank_of, linear_layers(model).values())):
        raise InputError(
            f"--model-tag {args.model_tag}: nothing to merge, all its matrices have full rank; "
            "to truncate them give --energy, --attn-rank or --mlp-rank"
        )


def ranks_to_choose(args, config: GPTConfig) -> dict:
    """{layer: function from its singular values to a rank}, for `truncate`. InputError for wrong ranks."""
    if args.lm_head_rank and config.tie_embeddings:
        raise InputError("--lm-head-rank: a tied head (--tie-embeddings) has no matrix of its own to factor")
    L = config.n_layer
    target = replace(
        config,
        attn_ranks=(args.attn_rank,) * L,
        mlp_ranks=(args.mlp_rank,) * L,
        lm_head_rank=args.lm_head_rank,
        matrix_ranks=named_ranks(args.matrix_ranks, L),
    )
    check_ranks(target)

    def whole_rank(rank, S):  # a fraction is of the smaller side, and S has as many values
        return resolve_rank(rank, len(S), len(S), args.rank_multiple)

    ranks = {
        factorize.block_matrix(matrix, layer): target.rank(matrix, layer)
        for layer in range(L)
        for matrix in MATRICES
    }
    choose = {name: partial(whole_rank, rank) for name, rank in ranks.items() if rank}
    if args.lm_head_rank:
        choose["lm_head"] = partial(whole_rank, args.lm_head_rank)
    if args.energy:
        choose |= dict.fromkeys(ranks, partial(factorize.rank_of_energy, args.energy))
    return choose


def change_matrices(args, model: GPT, merged: GPT, choose: dict) -> tuple[GPT, dict]:
    """(the new model, {name of a truncated layer: share of its energy that is kept})."""
    if args.truncates:
        new, energy_kept = factorize.truncate(merged, choose)
        if not energy_kept:
            raise InputError(
                f"--out-tag {args.out_tag}: at these ranks no matrix would have fewer parameters than it has;"
                " give lower ones"
            )
        return new, energy_kept
    if merged is not model:
        return merged, {}
    return factorize.merge(model), {}


def clocks_at(run: metrics.Run, step: int) -> dict:
    """Tokens, time and FLOPs of the training up to this step; {} if the history has no such entry."""
    for entry in run.history:
        if entry["step"] == step:
            return {key: entry[key] for key, _ in metrics.CLOCKS if key in entry}
    return {}


def write_run(out: Path, run: metrics.Run, model: GPT, tokenizer, flags: dict, derived: dict, values: dict):
    """Write the folder of a finished run with one checkpoint. run: the source; values: the only log entry."""
    derived = {**run.config["derived"], "model": asdict(model.config), **derived}
    derived.pop("origin", None)  # of an adapter run
    tokenizer.save(out / "tokenizer.json")
    config = {
        **run.config,
        "flags": flags,
        "given": sorted(flags),
        "derived": derived,
        "git": metrics.git_state(),
        "versions": metrics.versions(),
    }
    record = metrics.RunRecord(out, config, account(model.config), "dummy", [])
    record.log(values)
    meta = {
        "tokenizer_hash": tokenizer.hash,
        "model": asdict(model.config),
        "flags": deciding(flags),
        **record.commit(),
        "last": True,
    }
    save_checkpoint(out, values["step"], {"model": model.state_dict()}, meta)
    record.summarize("finished")
    record.close()
    print(f"finished: {out}")


def rank_flags(config: GPTConfig) -> dict:
    """The flags of rank that a report reads, with the values of the model."""
    return {
        "attn_rank": config.attn_ranks[0] if config.attn_ranks else 0,
        "mlp_rank": config.mlp_ranks[0] if config.mlp_ranks else 0,
        "lm_head_rank": config.lm_head_rank,
        "matrix_ranks": shortest_ranks_text(config.matrix_ranks),
        "rank_multiple": config.rank_multiple,
        "factor_act": config.factor_act,
        "rank_schedule": "constant",
        "attn_rank_schedule": "",
        "mlp_rank_schedule": "",
        "rank_end": 0,
        "attn_rank_end": 0,
        "mlp_rank_end": 0,
        "budget_params": "",
        "solve": None,
    }


def pretraining_flags(flags: dict) -> dict:
    """The run's flags as flags of base_train, since the new run has such a model.

    The flags of an adapter run get base_train's defaults. With an adapter, each position has its own layer
    now, so there is no layer map.
    """
    if "adapter" not in flags:
        return flags
    defaults = vars(build_parser().parse_args([])) | OLD_DEFAULTS
    new_flags = {name: flags.get(name, default) for name, default in defaults.items()}
    if flags["adapter"] != "none":
        new_flags["layer_map"] = ""
    return new_flags


# ---- output ------------------------------------------------------------------------------------------------


def print_evaluation(name: str, tokens: int, result: dict):
    print(
        f"{name:20} | {tokens:,} validation tokens | loss {result['val/loss']:.4f} | "
        f"ppl {result['val/ppl']:.3f} | bpb {result['val/bpb']:.4f}"
    )


def print_adapter(adapter: dict, model: GPT, merged: GPT):
    """Lines on the merged adapter, and on layers that several positions shared.

    adapter: the entry of meta.json.
    """
    description = adapter["description"]
    base = adapter["origin"]["bases"][0]["tag"]
    parameters = f"{account(model)['params/total']:,} → {account(merged)['params/total']:,} parameters"
    print(f"{description['kind']} on {base}: inside {len(description['matrices'])} matrices, {parameters}")
    distinct = {id(next(block.parameters())) for block in model.blocks}
    if len(distinct) < len(model.blocks):
        print(f"its positions shared layers; now each of the {len(merged.blocks)} positions has a copy")


def print_matrices(model: GPT, new: GPT, energy_kept: dict[str, float]):
    """A line for each matrix: rank and parameters before and after, and the share of energy that it kept."""

    def size(layer):
        return sum(p.numel() for p in layer.parameters())

    print(f"{'matrix':20}{'out x in':>14}{'rank':>16}{'parameters':>26}{'energy kept':>14}")
    new_layers = linear_layers(new)
    for name, layer in linear_layers(model).items():
        shape = f"{layer.out_features} x {layer.in_features}"
        rank = f"{rank_of(layer) or 'full'} → {rank_of(new_layers[name]) or 'full'}"
        parameters = f"{size(layer):,} → {size(new_layers[name]):,}"
        energy = f"{energy_kept[name]:14.4f}" if name in energy_kept else ""
        print(f"{name:20}{shape:>14}{rank:>16}{parameters:>26}{energy}")
    print(f"{'whole model':50}{f'{size(model):,} → {size(new):,}':>26}")


# ---- a file for plain PyTorch ------------------------------------------------------------------------------


def export(folder: Path, step: int, file: Path):
    """Write a checkpoint's weights as safetensors. The JSON beside it has all else that the logits need."""
    state, meta = load_checkpoint(folder, step)
    if "adapter" in meta:
        raise InputError(
            f"--safetensors {file}: {folder.name} is an adapter; "
            "give --out-tag too, the tag of a run with the merged model"
        )
    config = GPTConfig(**meta["model"])
    description = {
        "model": asdict(config),
        # for each position: how many tokens a query sees, itself included
        "windows": [config.window(layer) for layer in config.positions],
        "logit_softcap": SOFTCAP,
        "score_scale": SCORE_SCALE / (config.n_embd // config.n_head) ** 0.5,
        "rotary_base": 4.0 * config.sequence_len,
        "norm_eps": torch.finfo(torch.float32).eps,
        "tokenizer_hash": meta["tokenizer_hash"],
        "source": {"tag": folder.name, "step": step, "sha256": meta["sha256"]},
    }
    weights = safetensors.torch.save(dict(state["model"]), {"format": "pt"})
    write_atomic(file, weights)
    write_atomic(file.with_suffix(".json"), json.dumps(description, indent=2) + "\n")
    print(f"written: {file} ({len(weights) / 2**20:,.1f} MiB) and {file.with_suffix('.json').name}")


if __name__ == "__main__":
    common.run_script(main)
