"""All flags of the training scripts, and the tables that follow from their declarations.

A flag is declared once, as a Flag in model_flags.py or training_flags.py. To add one, say there what it
decides (`role`), whether a resumed run may change it (`free`), and the value with which older runs, which
lack it, go on as they began (`old_default`). What the flags mean together is decided in plan.py.
"""

from nanochat.arguments import ArgumentParser
from nanochat.flag_types import NO_OLD_DEFAULT, Role
from nanochat.model_flags import RANK_GROUP, RANK_MULTIPLE, SHAPE_GROUP, SUBSPACE_GROUP
from nanochat.training_flags import (
    CHECK_GROUP,
    CORE_GROUP,
    EVALUATION_GROUP,
    FLOAT8_GROUP,
    LENGTH_GROUP,
    MACHINE_GROUP,
    RATE_GROUP,
    RUN_GROUP,
    RUN_TAG,
    SAVING_GROUP,
    SCHEDULE_GROUP,
    START_GROUP,
)

FLAG_GROUPS = (
    RUN_GROUP,
    MACHINE_GROUP,
    FLOAT8_GROUP,
    START_GROUP,
    SHAPE_GROUP,
    RANK_GROUP,
    SUBSPACE_GROUP,
    LENGTH_GROUP,
    RATE_GROUP,
    SCHEDULE_GROUP,
    EVALUATION_GROUP,
    CORE_GROUP,
    SAVING_GROUP,
    CHECK_GROUP,
)
FLAGS = (*(flag for group in FLAG_GROUPS for flag in group.flags), RUN_TAG)


def build_parser() -> ArgumentParser:
    """The flags of scripts.base_train."""
    parser = ArgumentParser("Pretrain a GPT, full rank or low rank.")
    for group in FLAG_GROUPS:
        group.add_to(parser)
    return parser


def add_rank_multiple(add):
    """--rank-multiple alone, for scripts that only compute ranks. add: add_argument of a parser."""
    RANK_MULTIPLE.add_to(add)


# ---- tables that follow ------------------------------------------------------------------------------------


def flag_names(*roles: Role) -> tuple[str, ...]:
    """Names of the flags of these roles, in the order of their declaration: ('depth', 'model_dim', …)."""
    return tuple(flag.name for flag in FLAGS if flag.role in roles)


# What --init-from takes from the checkpoint. The report and adapter_train take it from a run's record, too.
SHAPE_FLAGS = (*SHAPE_GROUP.defaults(), *RANK_GROUP.defaults())

# The record of a run lacks the flags that came later. With these values such a run goes on, and is reported.
OLD_DEFAULTS = {flag.name: flag.old_default for flag in FLAGS if flag.old_default is not NO_OLD_DEFAULT}
