"""Every flag is declared once: what it means to a reader of --help, and what it decides."""

import subprocess
import sys

import pytest
from conftest import ROOT

from nanochat.flag_types import NO_OLD_DEFAULT, Flag, FlagGroup, Role
from nanochat.flags import FLAG_GROUPS, FLAGS, OLD_DEFAULTS, SHAPE_FLAGS, build_parser, flag_names


@pytest.mark.parametrize("flag", FLAGS, ids=[flag.name for flag in FLAGS])
def test_a_flag_says_what_it_means(flag):
    assert len(flag.help) > 10 and not flag.help.endswith(".")
    if flag.default in ("", -1):
        assert f"{flag.default!r} = " in flag.help, "what the default stands for"


def test_names_are_unique_and_titles_too():
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)
    assert len({group.title for group in FLAG_GROUPS}) == len(FLAG_GROUPS)


def test_a_declaration_becomes_a_flag_of_the_parser():
    declared = {flag.name: flag.default for group in FLAG_GROUPS for flag in group.flags}
    parser = build_parser()
    assert vars(parser.parse_args([])) == declared
    assert parser.parse_args(["--resume-from-step", "5"]).resume == "5"
    text = parser.format_help()
    assert "\nModel shape:\n" in text and "\nSaving and resuming:\n" in text and "--head-dim" in text


def test_a_new_flag_is_added_by_its_declaration_alone():
    """The default of False makes a switch; a group is a group of --help. A role has to be given."""
    flag = Flag("--try-it", "try it", role=Role.COST, default=False, old_default=True)
    group = FlagGroup("Trial", "What is tried.", (flag,))
    with pytest.raises(TypeError, match="role"):
        Flag("--try-it", "try it")
    parser = build_parser()
    group.add_to(parser)
    assert parser.parse_args(["--try-it"]).try_it is True and parser.parse_args([]).try_it is False
    assert "Trial:\n  What is tried." in parser.format_help()


def test_tables_follow_from_the_declarations():
    assert SHAPE_FLAGS[0] == "depth" and {"attn_rank", "solve", "plan"} <= set(SHAPE_FLAGS)
    assert flag_names(Role.NAME) == ("model_tag", "run_tag")
    assert OLD_DEFAULTS["horizon_from"] == "own" and OLD_DEFAULTS["init_from"] is None
    assert "depth" not in OLD_DEFAULTS and NO_OLD_DEFAULT not in OLD_DEFAULTS.values()


def test_reading_the_flags_loads_no_torch():
    program = "import sys; from nanochat.flags import build_parser; build_parser().parse_args([])"
    program += "; import nanochat.report.configurations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
