"""Provenance: the commit of this program, or none."""

import shutil
import subprocess
from pathlib import Path

import pytest

from nanochat import metrics
from nanochat.metrics import git_state

NONE = {"commit": None, "dirty": None}


def git(folder, *args):
    identity = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", *identity, *args], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def program(tmp_path):
    """The program's folder, inside another repository that has a commit."""
    folder = tmp_path / "users" / "program"
    (folder / "nanochat").mkdir(parents=True)
    shutil.copy(metrics.__file__, folder / "nanochat/metrics.py")
    (tmp_path / "users" / "mine.py").write_text("mine")
    git(tmp_path / "users", "init")
    git(tmp_path / "users", "add", "mine.py")
    git(tmp_path / "users", "commit", "-m", "the user's")
    return folder


def test_the_commit_is_that_of_the_programs_own_repository(program, monkeypatch, capfd):
    git(program, "init")
    assert git_state(program) == NONE, "no commit yet"
    git(program, "add", ".")
    git(program, "commit", "-m", "the program's")
    own = git(program, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(program.parent / ".git"))  # as in a hook of the repository around it
    monkeypatch.setenv("GIT_WORK_TREE", str(program.parent))
    assert git_state(program) == {"commit": own, "dirty": False}
    (program / "nanochat/metrics.py").write_text("changed")
    assert git_state(program) == {"commit": own, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert git_state(program) == NONE and capfd.readouterr() == ("", "")


def test_the_repository_around_the_program_is_not_its_own(program, capfd):
    assert git_state(program) == NONE
    git(program.parent, "add", ".")
    git(program.parent, "commit", "-m", "a copy of the program among the user's files")
    assert git_state(program) == NONE
    (program / ".git").mkdir()  # broken, or what an archive left of it: git would go on to the folder above
    assert git_state(program) == NONE
    (program / ".git").rmdir()
    (program / ".git").write_text("gitdir: /nowhere")
    assert git_state(program) == NONE and capfd.readouterr() == ("", "")


def test_a_repository_whose_files_are_others_is_not_its_own(program):
    """Installed into a folder that is a repository of something else."""
    git(program, "init")
    (program / "other.py").write_text("other")
    git(program, "add", "other.py")
    git(program, "commit", "-m", "others")
    assert git_state(program) == NONE


def test_this_very_checkout():
    root = Path(metrics.__file__).resolve().parents[1]
    expected = git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    assert git_state()["commit"] == expected
