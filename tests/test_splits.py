"""Which files of a folder are training text, validation text, or neither; what is said of it and recorded."""

import json

import pytest
from conftest import losses, story

from nanochat.dataset import open_corpus
from nanochat.errors import InputError
from nanochat.splits import find_split


def fill(folder, *names):
    """Files that hold their own names as text."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if ".jsonl" in name or ".json" in name:
            path.write_text(json.dumps({"text": name}) + "\n")
        else:
            path.write_text(name)
    return folder


def splits_of(folder):
    corpus = open_corpus(str(folder))
    left_out = sorted(name for names in corpus.left_out.values() for name in names)
    return list(corpus.documents("train")), list(corpus.documents("val")), left_out


@pytest.mark.parametrize(
    "name,split",
    [
        ("train-00000-of-00004", "train"),
        ("test-00000-of-00001", "test"),
        ("validation-00000-of-00001-869c898b519ad725", "val"),
        ("my_corpus.val", "val"),
        ("data_train", "train"),
        ("Dev", "val"),
        ("TEST", "test"),
        ("eval_2", "val"),
        ("valid", "val"),
        ("training", "train"),
        ("c4-train.00000-of-01024", "train"),
        ("train2", "train"),
        ("dev-test", "test"),
        ("train_val", "val"),
        ("shard_00000", None),
        ("latest", None),
        ("contest-1", None),
        ("development", None),
        ("trainspotting", None),
        ("0001", None),
        ("a_test_of_time", None),
        ("", None),
        ("evaluation", None),
        ("detest", None),
    ],
)
def test_words_tell_the_split(name, split):
    assert find_split(name, single_word=False) == split
    assert find_split(name.upper(), single_word=False) == split


def test_in_whole_names_no_other_word_counts():
    assert (
        find_split("the-test", single_word=True) is None
        and find_split("val-kilmer", single_word=True) is None
    )
    assert find_split("test", single_word=True) == find_split("test_3-of-4", single_word=True) == "test"


# (names, training, validation, left out)
LAYOUTS = {
    "the hub's, without validation": (
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"],
        ["train-00000-of-00002.jsonl"],
        ["train-00001-of-00002.jsonl"],
        ["test-00000-of-00001.jsonl"],
    ),
    "the hub's": (
        ["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"],
        ["train-00000-of-00001.jsonl"],
        ["validation-00000-of-00001.jsonl"],
        ["test-00000-of-00001.jsonl"],
    ),
    "names in front": (
        ["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"],
        ["wiki.train.txt"],
        ["wiki.valid.txt"],
        ["wiki.test.txt"],
    ),
    "a test split of many documents among shards": (
        ["a.jsonl", "b.jsonl", "my_test.jsonl"],
        ["a.jsonl"],
        ["b.jsonl"],
        ["my_test.jsonl"],
    ),
    "folders": (
        ["Train/a.jsonl", "train/b.jsonl", "dev/c.jsonl", "test/d.jsonl", "test/e.jsonl"],
        ["Train/a.jsonl", "train/b.jsonl"],
        ["dev/c.jsonl"],
        ["test/d.jsonl", "test/e.jsonl"],
    ),
    "files and folders": (
        ["a.jsonl", "train/b.jsonl", "val/c.jsonl", "test.jsonl"],
        ["a.jsonl", "train/b.jsonl"],
        ["val/c.jsonl"],
        ["test.jsonl"],
    ),
    "stories, of which some have names with such words": (
        ["a.txt", "the-test.txt", "trainspotting.txt", "val-kilmer.txt", "z.txt"],
        ["a.txt", "the-test.txt", "trainspotting.txt", "val-kilmer.txt"],
        ["z.txt"],
        [],
    ),
    "stories and one that is called test": (
        ["a.txt", "b.txt", "test.txt"],
        ["a.txt"],
        ["b.txt"],
        ["test.txt"],
    ),
    "plain shards": (
        ["shard_0.jsonl", "shard_1.jsonl", "shard_2.jsonl"],
        ["shard_0.jsonl", "shard_1.jsonl"],
        ["shard_2.jsonl"],
        [],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    names, train, val, left_out = LAYOUTS[layout]
    assert splits_of(fill(tmp_path, *names)) == (train, val, left_out)


def test_a_test_split_is_not_validated_on_either(tmp_path):
    message = (
        r"only train.jsonl, beside test.jsonl \(a test split, left out: call it val to validate on it\);"
    )
    with pytest.raises(InputError, match=message):
        open_corpus(str(fill(tmp_path, "train.jsonl", "test.jsonl")))
    with pytest.raises(InputError, match=r"no .parquet, .* left out: test.jsonl \(a test split\)"):
        open_corpus(str(fill(tmp_path / "only", "test.jsonl")))


def test_what_is_not_read_is_named(tmp_path):
    fill(
        tmp_path,
        "a.jsonl",
        "b.jsonl.gz.part",
        "notes.csv",
        "c.arrow",
        "README.md",
        "LICENSE",
        ".hidden.csv",
        "more/d.jsonl",
        "empty/x.bin",
        "e.jsonl",
        "deep/er/f.txt",
        "test.csv",
        "g.parquet.gz",
        "train/part/h.jsonl",
        "train/i.csv",
    )
    (tmp_path / "dataset_infos.json").write_text('{"default": {"splits": {}}}')
    line = open_corpus(str(tmp_path)).line()
    assert line == (
        f"text: {tmp_path}: 1 training file (a.jsonl), validation: e.jsonl (the last file), "
        "left out: LICENSE, README.md, dataset_infos.json (no text), "
        "b.jsonl.gz.part, c.arrow, g.parquet.gz, notes.csv, test.csv, train/i.csv "
        "(not read: give .parquet, .jsonl, .json or .txt, and .gz or .zst of the last three), "
        "deep/, more/, train/part/ (a folder that is not read: give it as --data)"
    )


def test_a_folder_without_text_says_what_it_has(tmp_path):
    message = r"no .parquet, .jsonl, .txt file .*; left out: a.csv \(not read: .*\), data/ \(a folder"
    with pytest.raises(InputError, match=message):
        open_corpus(str(fill(tmp_path, "a.csv", "data/train-0.jsonl")))


def test_the_line_of_many_files_names_the_first_and_the_last(tmp_path):
    fill(tmp_path, *(f"shard_{i:03d}.jsonl" for i in range(300)))
    fill(tmp_path, *(f"test-{i:03d}.jsonl" for i in range(200)))
    corpus = open_corpus(str(tmp_path))
    line = corpus.line()
    assert "299 training files (shard_000.jsonl … shard_298.jsonl), validation: shard_299.jsonl" in line
    assert "… 194 more …, test-199.jsonl (a test split)" in line and len(line) < 600
    record = corpus.record()
    assert record["train"]["count"] == 299 and len(record["train"]["files"]) == 101
    assert record["val"]["files"] == ["shard_299.jsonl"]


def test_a_run_says_and_records_which_files_are_which(base_dir, tmp_path, train, capsys):
    text = tmp_path / "text"
    text.mkdir()
    parts = {"train-0": range(100), "validation-0": range(100, 160), "test-0": range(160, 200)}
    for name, seeds in parts.items():
        (text / f"{name}.jsonl").write_text("".join(json.dumps({"text": story(s)}) + "\n" for s in seeds))
    run = train("--data", text, "--num-iterations", 3, "--save-every", 2)
    message = (
        f"text: {text}: 1 training file (train-0.jsonl), validation: validation-0.jsonl, "
        "left out: test-0.jsonl (a test split)\n"
    )
    assert message in capsys.readouterr().out
    assert run.config["text"] == {
        "train": {"count": 1, "files": ["train-0.jsonl"]},
        "val": {"count": 1, "files": ["validation-0.jsonl"]},
        "left_out": {"a test split": ["test-0.jsonl"]},
    }
    plain = tmp_path / "plain"
    plain.mkdir()
    for new, old in (("a", "train-0"), ("val", "validation-0")):
        (plain / f"{new}.jsonl").write_bytes((text / f"{old}.jsonl").read_bytes())
    there = train("--data", plain, "--num-iterations", 3, tag="plain")
    here = run.config["derived"]["corpus"] | {"name": "plain", "path": str(plain)}
    assert there.config["derived"]["corpus"] == here, "the test split is in neither"
    assert losses(there) == losses(run)
