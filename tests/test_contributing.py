"""CONTRIBUTING.md, CITATION.cff and CHANGELOG.md speak of what exists."""

import ast
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

GUIDE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
REFERENCES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", GUIDE)))
PATHS = sorted(
    set(re.findall(r"(?:nanochat|scripts|tests|dev)/[\w./]*\w", GUIDE)) - {"dev/experiments/NAME.toml"}
)


def names(path: Path) -> set[str]:
    """Functions, classes, methods (Class.method) and constants that a file defines."""
    defined = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        if isinstance(node, ast.ClassDef):
            defined |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return defined


@pytest.mark.parametrize("path, name", REFERENCES)
def test_every_name_of_the_guide_exists(path, name):
    assert name in names(ROOT / path)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_of_the_guide_exists(path):
    assert (ROOT / path).exists()


def test_the_map_names_every_file_of_the_core_once():
    rows = GUIDE.partition("## The map")[2].partition("## Set up")[0].split("\n| ")
    listed = re.findall(r"`(\w+)`", "".join(row.partition("|")[2] for row in rows))
    assert sorted(listed) == sorted({path.stem for path in (ROOT / "nanochat").glob("*.py")} - {"__init__"})


def test_the_guide_has_references():
    assert len(REFERENCES) >= 8 and len(PATHS) >= 15


def test_one_version_everywhere():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == version
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(r"^## \[(\d.*?)\]", changes, re.M)[1] == version


@pytest.mark.parametrize("path", [".github/workflows/ci.yml", ".pre-commit-config.yaml", "CITATION.cff"])
def test_settings_are_yaml(path):
    assert yaml.safe_load((ROOT / path).read_text("utf-8"))
