"""From the flags of rank to one rank a layer: schedules of each group, ranks of single matrices."""

import pytest
import torch
from conftest import TINY

from nanochat.errors import InputError
from nanochat.flag_types import matrix_ranks_flag
from nanochat.flags import build_parser
from nanochat.gpt import GPTConfig
from nanochat.layer_ranks import rank_lines
from nanochat.naming import default_tag
from nanochat.plan import model_config
from scripts import infer_bench, layer_bench, materialize


def config_of(*flags):
    return model_config(build_parser().parse_args([*TINY, "--depth", "4", *map(str, flags)]), 300)


RANKS = ("--attn-rank", 16, "--mlp-rank", 16)
LINEAR = ("--rank-schedule", "linear", "--rank-end", 4)


@pytest.mark.parametrize(
    "flags, attn, mlp",
    [
        ((*RANKS, "--rank-schedule", "step", "--rank-end", 4), (16, 16, 4, 4), (16, 16, 4, 4)),
        ((*RANKS, "--attn-rank-schedule", "step", "--attn-rank-end", 4), (16, 16, 4, 4), (16,) * 4),
        ((*RANKS, "--mlp-rank-schedule", "linear", "--rank-end", 4), (16,) * 4, (16, 12, 8, 4)),
        ((*RANKS, *LINEAR, "--attn-rank-schedule", "constant"), (16,) * 4, (16, 12, 8, 4)),
        ((*RANKS, *LINEAR, "--mlp-rank-end", 1), (16, 12, 8, 4), (16, 11, 6, 1)),
        (
            (*RANKS, *LINEAR, "--mlp-rank-schedule", "step", "--mlp-rank-end", 2),
            (16, 12, 8, 4),
            (16, 16, 2, 2),
        ),
        (("--rank-schedule", "8,4,2,1"), (8, 4, 2, 1), (8, 4, 2, 1)),
        (("--attn-rank", 16, "--mlp-rank-schedule", "8,4,2,1"), (16,) * 4, (8, 4, 2, 1)),
        (("--attn-rank-schedule", "8,4,2,1"), (8, 4, 2, 1), ()),
        (
            ("--rank-schedule", "8,4,2,1", "--mlp-rank-schedule", "constant", "--mlp-rank", 0.5),
            (8, 4, 2, 1),
            (0.5,) * 4,
        ),
        (
            ("--attn-rank", 0.5, "--attn-rank-schedule", "linear", "--attn-rank-end", 0.2),
            (0.5, 0.4, 0.3, 0.2),
            (),
        ),
    ],
)
def test_each_group_has_its_own_schedule_or_the_common_one(flags, attn, mlp):
    config = config_of(*flags)
    assert config.attn_ranks == pytest.approx(attn) and config.mlp_ranks == pytest.approx(mlp)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--attn-rank", 8, "--rank-schedule", "8,4,2,1"),
            r"^--rank-schedule 8,4,2,1: gives the ranks that --attn-rank 8 gives too; "
            "leave --attn-rank out, or ",
        ),
        (
            ("--mlp-rank", 0.5, "--rank-schedule", "8,4,2,1"),
            r"^--rank-schedule 8,4.* --mlp-rank 0.5 gives too",
        ),
        (
            ("--mlp-rank", 8, "--mlp-rank-schedule", "8,4,2,1"),
            r"^--mlp-rank-schedule 8.* --mlp-rank 8 gives too",
        ),
        (("--mlp-rank-schedule", "8,4"), r"^--mlp-rank-schedule 8,4: give 4 ranks above 0, one a layer"),
        (
            ("--attn-rank", 8, "--mlp-rank-schedule", "linear", "--rank-end", 4),
            r"^--mlp-rank-schedule linear: needs --mlp-rank above 0",
        ),
        (("--attn-rank", 8, *LINEAR, "--mlp-rank-end", 2), r"^--mlp-rank-end 2: needs --mlp-rank above 0"),
        (
            ("--attn-rank", 8, "--attn-rank-schedule", "linear"),
            r"^--attn-rank-schedule linear: needs --rank-end above 0, or --attn-rank-end$",
        ),
        (
            ("--attn-rank", 8, "--attn-rank-end", 4),
            r"^--attn-rank-end 4: means nothing under --rank-schedule constant; "
            "give --attn-rank-schedule linear",
        ),
        (
            ("--attn-rank", 8, "--attn-rank-schedule", "linear", "--attn-rank-end", 0.5),
            r"^--attn-rank-end 0.5: give it as --attn-rank 8 is given",
        ),
        (("--attn-rank-schedule", "wavy"), r"^--attn-rank-schedule wavy: use one of constant"),
        (
            ("--matrix-ranks", "up=8/8"),
            r"^--matrix-ranks up=8/8: gives up 2 ranks; give one, or 4, one a layer$",
        ),
        (("--matrix-ranks", "up=8/8/8/99"), r"^--matrix-ranks: up \(layer 3\): rank 99 does not fit"),
        (("--attn-rank", 33, "--matrix-ranks", "v=0"), r"^--attn-rank \(layer 0\): rank 33 does not fit"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, message):
    with pytest.raises(InputError, match=message) as error:
        config_of(*flags)
    assert "\n" not in str(error.value)


def test_a_matrix_has_one_rank_or_one_a_layer():
    config = config_of("--mlp-rank", 4, "--matrix-ranks", " down = 8/0/0.5/1, v=0.25")
    assert config.matrix_ranks == {"down": (8, 0, 0.5, 1), "v": (0.25,) * 4}
    assert [config.whole_rank("down", layer) for layer in range(4)] == [8, 0, 16, 1]
    assert config.whole_rank("up", 1) == 4
    text = matrix_ranks_flag("v=0.250, down=8/0/.5/1")
    assert text == "down=8/0/0.5/1,v=0.25" == matrix_ranks_flag(text)
    assert matrix_ranks_flag("v=8/8") == "v=8/8", "a list of equal ranks still says how many layers there are"
    config = config_of("--n-kv-head", 1, "--attn-rank", 20, "--matrix-ranks", "k=0,v=0")
    assert config.whole_rank("q", 0) == 20, "k and v, which it would not fit, are not asked for it"


def test_ranks_are_printed_with_what_a_fraction_means():
    wide = ("--model-dim", 1024, "--head-dim", 64, "--n-kv-head", 4)
    ranks = ("--attn-rank", 0.25, "--mlp-rank", 0.297, "--matrix-ranks", "o=0,down=64/64/0.1/0")
    lines = rank_lines(config_of(*wide, *ranks))
    assert lines == [
        "rank of attention: 0.25 (256 and 64)",
        "rank of mlp: 0.297 (320)",
        "rank of down: 64, 64, 0.1 (128), full",
        "rank of o: full",
        "rank of lm_head: full",
    ]
    given = rank_lines(config_of(*wide, "--attn-rank", 100, "--mlp-rank", 0.297, "--rank-multiple", 1))
    assert given[:2] == ["rank of attention: 100", "rank of mlp: 0.297 (304)"]


def test_every_script_takes_the_same_multiple():
    wide = ("--model-dim", "1280", "--head-dim", "128")
    for multiple, rank in ((-1, 384), (1, 380), (96, 384), (50, 400)):
        flags = ("--rank-multiple", str(multiple))
        args = materialize.flag_parser().parse_args(
            ["--model-tag", "a", "--out-tag", "b", "--mlp-rank", "0.297", *flags]
        )
        choose = materialize.ranks_to_choose(args, GPTConfig(n_layer=1, n_head=10, n_kv_head=10, n_embd=1280))
        assert choose["blocks.0.mlp.up"](torch.ones(1280)) == rank
        bench = layer_bench.flag_parser().parse_args([*wide, "--ranks", "0.297", *flags])
        assert layer_bench.with_ranks(bench, "MLP up", 1280, 5120).ranks == [rank]
        args = infer_bench.flag_parser().parse_args([*wide, "--mlp-rank", "0.297", *flags])
        assert infer_bench.model_config(args).whole_rank("down", 0) == rank


def test_the_tag_tells_models_apart():
    def tag(*flags):
        args = build_parser().parse_args([*TINY, *map(str, flags)])
        return default_tag(args, model_config(args, 300))

    assert tag("--mlp-rank", 0.25, "--matrix-ranks", "v=0,q=8") == "d2_w32_mlp0.25_q8_v0"
    own = tag("--mlp-rank", 0.25, "--matrix-ranks", "v=0/8", "--rank-multiple", 4)
    assert own == "d2_w32_mlp0.25_v0-8_multiple4"
