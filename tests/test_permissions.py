"""Files and folders have the permissions that the user's umask leaves: a group may share a base directory."""

import os

import pytest


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_a_run_leaves_files_that_the_umask_allows(train, base_dir, umask):
    before = set(base_dir.rglob("*"))
    others = os.umask(umask)
    try:
        train("--num-iterations", 1, "--save-every", 1, tag="shared")
    finally:
        os.umask(others)
    made = [path for path in base_dir.rglob("*") if path not in before]
    names = {path.name for path in made}
    assert names >= {
        "__0_0.distcp",
        "__0_0.json",
        ".metadata",
        "meta.json",
        "config.json",
        "metrics.jsonl",
        "shared.lock",
    }
    for path in made:
        whole = 0o777 if path.is_dir() else 0o666
        mode = path.stat().st_mode & 0o777
        assert mode == whole & ~umask, f"{path}: {mode:o}"
