"""dev/FLAGS.md is what dev/flags_page.py prints, and shows what a reader of --help sees."""

import argparse
import sys
from importlib import import_module

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def flags_page():
    sys.path.insert(0, str(ROOT / "dev"))
    yield import_module("flags_page")
    sys.path.remove(str(ROOT / "dev"))


def test_the_page_is_up_to_date(flags_page):
    written = (ROOT / "dev/FLAGS.md").read_text("utf-8")
    assert written == flags_page.page(), "run: python dev/flags_page.py > dev/FLAGS.md"


def test_every_script_has_a_section(flags_page):
    described = {script for _, scripts in flags_page.SCRIPTS for script in scripts}
    assert described == {file.stem for file in (ROOT / "scripts").glob("[a-z]*.py")}


def test_a_section_has_groups_defaults_and_no_hidden_flags(flags_page, monkeypatch):
    parser = argparse.ArgumentParser(description="Try.", prog="try")
    parser.add_argument("text")
    parser.add_argument("--launched", type=int, help=argparse.SUPPRESS)
    group = parser.add_argument_group("ranks", "Which matrices are factored.")
    group.add_argument("--solve", choices=["depth", "rank"], default="rank", help="50%% of a|b, %(default)s")
    group.add_argument("--lr", type=float, default=0.10, required=False)
    hidden = parser.add_argument_group("internal")
    hidden.add_argument("--pid", help=argparse.SUPPRESS)
    monkeypatch.setattr(flags_page, "find_parser", lambda script: parser)
    text = flags_page.section("try")
    assert text.startswith("### try\n\nTry.\n\n| flag") and "--help" not in text
    assert "**Ranks**\n\nWhich matrices are factored.\n\n| flag" in text
    assert "| `--solve depth\\|rank` | rank | 50% of a\\|b, rank |" in text
    assert "| `--lr` | 0.1 |  |" in text and "| `text` |  |  |" in text
    assert "launched" not in text and "nternal" not in text
