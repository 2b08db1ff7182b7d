"""Checks that the values of a run's config.json and summary.json have the types that the report relies on."""

import dataclasses
import math

from nanochat.errors import InputError, shortened
from nanochat.files import is_kind
from nanochat.history import NUMBERS
from nanochat.metrics import Run

RUN_REMEDY = "restore it, or leave the run out"
AMOUNTS = ("params/", "mem/", "flops/", "total_")  # finite and at least 0, even if the run diverged
MAX_LAYERS = 100_000
REQUIRED_MODEL_KEYS = ("n_layer", "n_embd", "n_head", "n_kv_head")


def checked_run(run: Run) -> Run:
    """The run without nulls. InputError if a value has another type than the report relies on."""
    config = {key: value if key == "flags" else without_nulls(value) for key, value in run.config.items()}
    config = {key: value for key, value in config.items() if value is not None}
    run = dataclasses.replace(run, config=config, summary=without_nulls(run.summary))
    check_config(run)
    check_summary(run)
    return run


def without_nulls(tree):
    """The table, and the tables in it, without the values that are null: not known."""
    if not isinstance(tree, dict):
        return tree
    return {key: without_nulls(value) for key, value in tree.items() if value is not None}


def check_config(run: Run):
    parts = {name: table(run, run.config, name) for name in ("flags", "derived", "device", "git", "versions")}
    model = table(run, parts["derived"], "model")
    corpus = table(run, parts["derived"], "corpus")
    for key, value in table(run, run.config, "reference_losses").items():
        require(run, f"reference_losses.{key}", value, is_positive)
    require(run, "seed", run.config.get("seed"), is_integer)
    for key, value in parts["flags"].items():
        require(run, f"flags.{key}", value, FLAG_KINDS.get(key, is_setting))
    for key, value in (parts["device"] | parts["git"] | parts["versions"]).items():
        require(run, key, value, is_plain)
    for key, kind in DERIVED_KINDS.items():
        require(run, f"derived.{key}", parts["derived"].get(key), kind)
    for key, value in corpus.items():
        require(run, f"derived.corpus.{key}", value, is_plain)
    for key, value in model.items():
        require(run, f"derived.model.{key}", value, MODEL_KINDS.get(key, is_setting))
    require_keys(run, "derived", parts["derived"], ("num_iterations",))
    require_keys(run, "derived.model", model, REQUIRED_MODEL_KEYS)


def check_summary(run: Run):
    for key, value in run.summary.items():
        if key.startswith(AMOUNTS):
            require(run, key, value, is_amount)
        elif key.startswith((*NUMBERS, "time_to_ppl/")):
            require(run, key, value, is_number)
    require(run, "step", run.summary.get("step"), is_integer)
    require(run, "adalora/ranks", run.summary.get("adalora/ranks"), is_table_of_integers)


def table(run: Run, parent: dict, name: str) -> dict:
    value = parent.get(name)
    require(run, name, value, is_table)
    return value or {}


def require(run: Run, key: str, value, kind):
    """InputError unless kind(value); a value that is missing will do."""
    if value is not None and not kind(value):
        raise InputError(
            f"run {run.name}: {shortened(key)} is {shortened(repr(value))}, which no run writes; {RUN_REMEDY}"
        )


def require_keys(run: Run, name: str, values: dict, keys: tuple[str, ...]):
    """InputError if the table has values, but lacks one of these."""
    missing = [key for key in keys if values and key not in values]
    if missing:
        raise InputError(f"run {run.name}: {name}.{missing[0]} is missing from config.json; {RUN_REMEDY}")


# ---- kinds of values ---------------------------------------------------------------------------------------


def is_text(value) -> bool:
    return isinstance(value, str)


def is_number(value) -> bool:
    return is_kind(value, float)


def is_integer(value) -> bool:
    return is_kind(value, float) and abs(value) < 2**63 and value == int(value)


def are_parts(value) -> bool:
    """Text such as "q=64,v=0.5/0.25"."""
    return is_text(value) and all(part.count("=") == 1 for part in value.split(",") if part)


def is_size(value) -> bool:
    return is_integer(value) and value > 0


def is_positive(value) -> bool:
    return is_number(value) and 0 < value < math.inf


def is_plain(value) -> bool:
    """Text, a number or a boolean."""
    return isinstance(value, (str, int, float))


def is_setting(value) -> bool:
    """What a flag may be: a plain value, or a list of them."""
    return is_plain(value) or (isinstance(value, list) and all(map(is_plain, value)))


def is_list(value) -> bool:
    return isinstance(value, list) and is_setting(value)


def are_amounts(value) -> bool:
    if not isinstance(value, list) or len(value) > MAX_LAYERS:
        return False
    return all(map(is_amount, value))


def is_amount(value) -> bool:
    return is_number(value) and 0 <= value < math.inf


def are_amounts_by_name(value) -> bool:
    return isinstance(value, dict) and all(map(are_amounts, value.values()))


def is_table(value) -> bool:
    return isinstance(value, dict)


def is_table_of_integers(value) -> bool:
    return isinstance(value, dict) and all(map(is_integer, value.values()))


TEXT_FLAGS = (
    "adapter",
    "layer_map",
    "subspace",
    "subspace_scope",
    "init_from",
    "model_tag",
    "run_tag",
    "solve",
    "factor_act",
)
FLAG_KINDS = {  # other flags: is_setting
    **dict.fromkeys(TEXT_FLAGS, is_text),
    **dict.fromkeys(("rank", "subspace_dim", "subspace_rank", "mlp_ratio", "stop_at_ppl"), is_number),
    "seed": is_integer,
    "matrix_ranks": are_parts,
}
MODEL_KINDS = {  # other keys: is_setting
    **dict.fromkeys(("n_layer", "n_embd", "n_head", "n_kv_head", "vocab_size", "sequence_len"), is_size),
    "rank_multiple": is_integer,
    "mlp_ratio": is_positive,
    "factor_act": is_text,
    "attn_ranks": are_amounts,
    "mlp_ranks": are_amounts,
    "lm_head_rank": is_amount,
    "matrix_ranks": are_amounts_by_name,
    "layer_map": are_amounts,
    "layer_kinds": is_list,
}
DERIVED_KINDS = {  # of other keys nothing is required
    **dict.fromkeys(("num_iterations", "total_batch_size", "tokens", "val_tokens"), is_integer),
    "matrix_lr": is_number,
    "tokenizer_hash": is_text,
}
