"""A checkpoint in another form: factors multiplied out, an adapter merged, matrices cut down to factors by SVD, or a file for plain PyTorch.

    python -m scripts.materialize --model-tag low --out-tag low_dense                          every product BA as one matrix: the same logits
    python -m scripts.materialize --model-tag full --attn-rank 64 --mlp-rank 0.25 --out-tag full_svd    the nearest matrices of these ranks
    python -m scripts.materialize --model-tag full --energy 0.9 --out-tag full_e90             the smallest ranks that keep 90% of each Σ s²
    python -m scripts.materialize --model-tag wiki --out-tag wiki_merged               an adapter inside the matrices of its base
    python -m scripts.materialize --model-tag low --safetensors low.safetensors                as it is, for dev/plain_forward.py
The new run folder is as whole as any: scripts.base_eval and scripts.report read it, and base_train --init-from trains it on.
"""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from nanochat import common, metrics
from nanochat.adapters.attach import plain
from nanochat.adapters.loading import load_model
from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint, step_or_newest
from nanochat.common import InputError, number, whole_number
from nanochat.continuation import deciding, differing_keys
from nanochat.factorize import (
    block_matrix,
    check_linear,
    linear_layers,
    merge,
    rank_of,
    rank_of_energy,
    truncate,
)
from nanochat.files import check_out, write_atomic
from nanochat.flag_types import matrix_ranks_flag, rank_flag
from nanochat.flags import DEFAULTS_BEFORE, add_rank_multiple, build_parser
from nanochat.gpt import MATRICES, SCORE_SCALE, GPTConfig
from nanochat.layer_ranks import check_ranks, named_ranks
from nanochat.loss_eval import evaluate, validation_rows
from nanochat.naming import optional_tag, run_folder, tag
from nanochat.ops import SOFTCAP
from nanochat.rank import account
from nanochat.run_files import complete_summary
from nanochat.whole_ranks import AUTOMATIC, resolve_rank, shortest_ranks_text


def parse(argv):
    parser = common.ArgumentParser(
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
    add("--mlp-rank", type=rank_flag, default=0)
    add("--lm-head-rank", type=rank_flag, default=0)
    add(
        "--matrix-ranks",
        type=matrix_ranks_flag,
        default="",
        help="of single matrices, whatever their group's: e.g. v=128,down=0.5, or one rank a layer: "
        "v=64/64/128; 0 = leave it",
    )
    add_rank_multiple(add)
    add(
        "--energy",
        type=number(0, 1),
        default=None,
        help="truncate each matrix of the blocks to the smallest rank that keeps this share of its squared singular values",
    )
    add("--data", default="", help="where the run's text is now; '' = where the run read it")
    add(
        "--eval-tokens",
        type=whole_number(0, off=-1),
        default=-1,
        help="validation tokens, before and after; -1 = as many as in the run; 0 = none",
    )
    add("--device-batch-size", type=whole_number(1), default=32)
    common.device_flags(add, "of the evaluation; weights are float32")
    add(
        "--safetensors",
        type=Path,
        default=None,
        metavar="FILE.safetensors",
        help="write it, with FILE.json beside it: the new run or, without --out-tag, the checkpoint as it is",
    )
    args = parser.parse_args(argv)

    ranks = [
        flag
        for flag in ("attn_rank", "mlp_rank", "matrix_ranks", "lm_head_rank", "energy")
        if getattr(args, flag)
    ]
    shown = [f"--{flag.replace('_', '-')}" for flag in ranks]
    if not (args.out_tag or args.safetensors):
        raise InputError("--out-tag: give the new run's tag, or a file with --safetensors")
    if ranks and not args.out_tag:
        raise InputError(f"{shown[0]}: needs --out-tag, the run that is to hold the truncated model")
    if args.out_tag == args.model_tag:
        raise InputError(f"--out-tag {args.out_tag}: is the run itself; choose another tag")
    if args.energy is not None and not 0 < args.energy < 1:
        raise InputError(f"--energy {args.energy:g}: give a share between 0 and 1, such as 0.9")
    if args.energy and set(ranks) - {"energy", "lm_head_rank"}:
        raise InputError(f"--energy: not with {shown[0]}: it finds the ranks in the blocks")
    if args.safetensors and args.safetensors.suffix != ".safetensors":
        raise InputError(
            f"--safetensors {args.safetensors}: the name has to end in .safetensors; the config goes beside it, ending in .json"
        )
    if args.safetensors:
        check_out("--safetensors", args.safetensors, is_file=True)
    args.truncates = bool(ranks)
    return args


def main(argv=None):
    args = parse(argv)
    folder = run_folder("--model-tag", args.model_tag)
    run = metrics.load_run(folder)
    step = step_or_newest(folder, args.step)
    if run.config["flags"].get("subspace"):
        raise InputError(
            f"--model-tag {args.model_tag}: trained with --subspace, its matrices are made from a seed and not stored; take a run without it"
        )
    if args.out_tag:
        out = metrics.runs_dir() / args.out_tag
        with common.claimed(
            common.get_base_dir() / "locks" / f"{args.out_tag}.lock", f"--out-tag {args.out_tag}: {out}"
        ):
            metrics.remove_left_overs(out)
            make_run(args, run, folder, step, out)
        folder = out
    if args.safetensors:
        export(folder, step, args.safetensors)


# ---- a new run ------------------------------------------------------------------------------------------------------


def make_run(args, run: metrics.Run, folder: Path, step: int, out: Path):
    """Write the run folder `out` from a checkpoint; its summary, which says finished, comes last."""
    world = common.init_process(args.device_type, alone=True)
    device = world.device
    dtype = common.compute_dtype(args.dtype, device.type)
    model, tokenizer, meta = load_model(folder, step, device)
    eval_tokens = args.eval_tokens if args.eval_tokens >= 0 else run.config["flags"]["eval_tokens"]
    flags = ("attn_rank", "mlp_rank", "matrix_ranks", "lm_head_rank", "energy", "rank_multiple")
    asked = {flag: getattr(args, flag) for flag in flags}
    source = {"tag": args.model_tag, "step": step, "sha256": meta["sha256"], **asked}
    if is_done(out, {"source": source, "eval_tokens": eval_tokens}):
        return print(f"{args.out_tag}: already made from {args.model_tag}, see {out}")

    # what cannot be done is said before the text is read
    whole = plain(model)  # of an adapter run the model with the adapter inside
    merges_adapter = whole is not model
    try:
        if args.truncates or not merges_adapter:
            check_linear(whole)
    except ValueError as e:
        raise InputError(
            f"--model-tag {args.model_tag}: {e}; it can be neither merged nor truncated"
        ) from None
    choose = ranks_to_choose(args, whole.config)
    if not (args.truncates or merges_adapter) and not any(map(rank_of, linear_layers(model).values())):
        raise InputError(
            f"--model-tag {args.model_tag}: nothing to merge, all its matrices are whole; "
            "to truncate them give --energy, --attn-rank or --mlp-rank"
        )
    eval_set = None
    if eval_tokens:
        T = model.config.sequence_len
        eval_set = validation_rows(run, tokenizer, T, eval_tokens, args.data, optional=True)

    new, kept = truncate(whole, choose) if args.truncates else (whole if merges_adapter else merge(whole), {})
    if args.truncates and not kept:
        raise InputError(
            f"--out-tag {args.out_tag}: at these ranks no matrix would have fewer parameters than it has; give lower ones"
        )
    if merges_adapter:
        print_adapter(meta["adapter"], model, whole)
    if new is not whole:
        print_matrices(whole, new, kept)
    values = {"step": step}
    if eval_set:
        before, after = (evaluate(m, eval_set, args.device_batch_size, world, dtype) for m in (model, new))
        for tag, found in ((args.model_tag, before), (args.out_tag, after)):
            print(
                f"{tag:20} | {eval_set.tokens:,} validation tokens | loss {found['val/loss']:.4f} | "
                f"ppl {found['val/ppl']:.3f} | bpb {found['val/bpb']:.4f}"
            )
        values |= after | {f"source/{key}": value for key, value in before.items()}

    # the run; its step, tokens, time and FLOPs are those of the training that led to its source
    values |= next(
        (
            {key: entry[key] for key, _ in metrics.CLOCKS if key in entry}
            for entry in run.history
            if entry["step"] == step
        ),
        {},
    )
    flags = {
        **of_base_train(run.config["flags"]),
        **rank_flags(new.config),
        "model_tag": args.out_tag,
        "eval_tokens": eval_tokens,
        "materialized_from": f"{args.model_tag}:{step}",
    }
    derived = {
        **run.config["derived"],
        "model": asdict(new.config),
        "val_tokens": eval_set.tokens if eval_set else 0,
        "source": source,
    }
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
    record = metrics.RunRecord(out, config, account(new.config), "dummy", [])
    record.log(values)
    meta = {
        "tokenizer_hash": tokenizer.hash,
        "model": asdict(new.config),
        "flags": deciding(flags),
        **record.commit(),
        "last": True,
    }
    save_checkpoint(out, step, {"model": new.state_dict()}, meta)
    record.summarize("finished")
    record.close()
    print(f"finished: {out}")


def is_done(out: Path, wanted: dict) -> bool:
    """Whether the run is there and finished. InputError if it is something else."""
    if not (out / "config.json").exists():
        return False
    there = metrics.load_run(out)
    if "materialized_from" not in there.config["flags"]:
        raise InputError(
            f"--out-tag {out.name}: exists, and is a training run; choose another tag, or remove {out}"
        )
    derived = there.config["derived"]
    flags = there.config["flags"]
    before = {"source": derived["source"], "eval_tokens": flags["eval_tokens"]}
    if "rank_multiple" not in before["source"] and wanted["source"]["rank_multiple"] == AUTOMATIC:
        before["source"]["rank_multiple"] = AUTOMATIC  # made before there was the flag: it stays as it is
    if differing := differing_keys(before, wanted):
        raise InputError(
            f"--out-tag {out.name}: exists and is something else: {'; '.join(differing)}; choose another tag, or remove {out}"
        )
    if there.summary["status"] != "finished":
        return False
    complete_summary(out)
    return True


def ranks_to_choose(args, config: GPTConfig) -> dict:
    """{layer: function from its singular values to a rank} of the flags, for `truncate`. InputError for ranks that do not fit."""
    if args.lm_head_rank and config.tie_embeddings:
        raise InputError("--lm-head-rank: a tied head (--tie-embeddings) has no matrix of its own to factor")
    L = config.n_layer
    wanted = replace(
        config,
        attn_ranks=(args.attn_rank,) * L,
        mlp_ranks=(args.mlp_rank,) * L,
        lm_head_rank=args.lm_head_rank,
        matrix_ranks=named_ranks(args.matrix_ranks, L),
    )
    check_ranks(wanted)
    ranks = {
        block_matrix(matrix, layer): wanted.rank(matrix, layer) for layer in range(L) for matrix in MATRICES
    }

    def whole(rank, S):  # a fraction is of the smaller side, and S has as many values
        return resolve_rank(rank, len(S), len(S), args.rank_multiple)

    asked = ranks | {"lm_head": args.lm_head_rank}
    choose = {name: partial(whole, rank) for name, rank in asked.items() if rank}
    return choose | (dict.fromkeys(ranks, partial(rank_of_energy, args.energy)) if args.energy else {})


def rank_flags(config: GPTConfig) -> dict:
    """The flags on rank that a report reads, as the model has them."""
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


def of_base_train(flags: dict) -> dict:
    """The flags of a run; of adapter_train's as base_train has them, whose kind of model comes out: under no layer map if that was copied out."""
    if "adapter" not in flags:
        return flags
    usual = vars(build_parser().parse_args([])) | DEFAULTS_BEFORE
    return {name: flags.get(name, default) for name, default in usual.items()} | (
        {"layer_map": ""} if flags["adapter"] != "none" else {}
    )


def print_adapter(said: dict, model, whole):
    """What became of an adapter, and of layers that several positions shared."""
    size = (account(m)["params/total"] for m in (model, whole))
    description = said["description"]
    print(
        "{} on {}: inside {} matrices, {:,} → {:,} parameters".format(
            description["kind"], said["origin"]["bases"][0]["tag"], len(description["matrices"]), *size
        )
    )
    if len({id(next(block.parameters())) for block in model.blocks}) < len(model.blocks):
        print(f"its positions shared layers: first copied out, to {len(whole.blocks)} layers of their own")


def print_matrices(model, new, kept: dict[str, float]):
    """A line for each matrix: rank and parameters before and after, and what it kept."""

    def size(layer):
        return sum(p.numel() for p in layer.parameters())

    print(f"{'matrix':20}{'out x in':>14}{'rank':>16}{'parameters':>26}{'energy kept':>14}")
    after = linear_layers(new)
    for name, layer in linear_layers(model).items():
        rank = f"{rank_of(layer) or 'full'} → {rank_of(after[name]) or 'full'}"
        numbers = f"{size(layer):,} → {size(after[name]):,}"
        print(
            f"{name:20}{f'{layer.out_features} x {layer.in_features}':>14}{rank:>16}{numbers:>26}"
            + (f"{kept[name]:14.4f}" if name in kept else "")
        )
    print(f"{'whole model':50}{f'{size(model):,} → {size(new):,}':>26}")


# ---- a file for plain PyTorch ---------------------------------------------------------------------------------------


def export(folder: Path, step: int, file: Path):
    """The weights of a checkpoint as safetensors and, beside them, all that one needs to compute logits from them as JSON."""
    state, meta = load_checkpoint(folder, step)
    if "adapter" in meta:
        raise InputError(
            f"--safetensors {file}: {folder.name} is an adapter; give --out-tag too, the run that is to hold the merged model"
        )
    config = GPTConfig(**meta["model"])
    said = {
        "model": asdict(config),
        "windows": [
            config.window(layer) for layer in config.positions
        ],  # positions back that a query sees, itself included
        "logit_softcap": SOFTCAP,
        "score_scale": SCORE_SCALE / (config.n_embd // config.n_head) ** 0.5,
        "rotary_base": 4.0 * config.sequence_len,
        "norm_eps": torch.finfo(torch.float32).eps,
        "tokenizer_hash": meta["tokenizer_hash"],
        "source": {"tag": folder.name, "step": step, "sha256": meta["sha256"]},
    }
    weights = safetensors.torch.save(state["model"], {"format": "pt"})
    write_atomic(file, weights)
    write_atomic(file.with_suffix(".json"), json.dumps(said, indent=2) + "\n")
    print(f"written: {file} ({len(weights) / 2**20:,.1f} MiB) and {file.with_suffix('.json').name}")


if __name__ == "__main__":
    common.run_script(main)
