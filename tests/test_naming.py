"""What can name a run, everywhere a run is named; and what is said of one that is not there."""
import pytest

from conftest import tiny_experiment
from nanochat import metrics
from nanochat.common import InputError
from nanochat.experiment import read_experiment
from nanochat.naming import is_tag, run_folder
from scripts import (adapter_train, base_eval, base_train, generate, infer_bench, layer_map_eval, materialize,
                     sweep)

NO_TAGS = ["../up", "/tmp/x", "a/b", "..", ".", ".hidden", "-rf", "a\nb", "a\0b", "a\tb", " a", "a ", "a:1",
           "a\\b", "a*", "$HOME", "~", "x" * 151, "é" * 76, "\udcff"]
TAGS = ["d20", "d4_w256_attn0.25-0.5_map0-0-1-1", "d2_Fastfood-5-in-all", "stories (2)_v300", "Märchen_d4",
        "物語", "a=1,b+2@x", "_x", "x" * 150, "1..2"]
TAKERS = [(base_train, "--model-tag"), (base_train, "--init-from"), (base_eval, "--model-tag"),
          (generate, "--model-tag"), (infer_bench, "--model-tag"), (layer_map_eval, "--model-tag"),
          (layer_map_eval, "--second-tag"), (materialize, "--model-tag"), (materialize, "--out-tag"),
          (adapter_train, "--model-tag"), (adapter_train, "--run-tag"), (adapter_train, "--second-tag")]


def test_what_can_be_a_tag():
    assert [text for text in NO_TAGS if is_tag(text)] == [] == [text for text in TAGS if not is_tag(text)]


@pytest.mark.parametrize("script, flag", TAKERS, ids=[f"{script.__name__} {flag}" for script, flag in TAKERS])
def test_a_tag_that_leads_elsewhere_is_refused_before_anything_is_touched(base_dir, script, flag):
    needed = {adapter_train: ["--model-tag", "a", "--run-tag", "b"], materialize: ["--model-tag", "a"],
              layer_map_eval: ["--model-tag", "a", "--maps", "0"]}
    there = set(base_dir.rglob("*"))
    for text in NO_TAGS:
        if flag == "--init-from" and text == "a:1":
            continue  # TAG:STEP
        with pytest.raises(InputError,
                           match=f"{flag}.*becomes the name of a folder; use letters, digits") as e:
            script.main([*needed.get(script, []), f"{flag}={text}"])
        assert "\n" not in str(e.value)
    assert set(base_dir.rglob("*")) == there


def test_a_run_that_is_not_there(base_dir):
    with pytest.raises(InputError, match="--model-tag full: no such run in .*runs; it holds no runs"):
        run_folder("--model-tag", "full")
    for tag in ("d4_full", "d4_low", "other"):
        (metrics.runs_dir() / tag).mkdir(parents=True)
        (metrics.runs_dir() / tag / "config.json").write_text("{}")
    assert run_folder("--model-tag", "other") == metrics.runs_dir() / "other"
    for script, argv, message in [
            (base_eval, ["--model-tag", "d4-full"],
             "--model-tag d4-full: no such run in .*runs; did you mean d4_full"),
            (generate, ["--model-tag", "xyz", "-p", "a"],
             "no such run in .*; there are: d4_full, d4_low, other"),
            (base_train, ["--init-from", "d4_ful"],
             "--init-from d4_ful: no such run in .*; did you mean d4_full"),
            (base_train, ["--init-from", "d4_full"],
             "--init-from d4_full: the run d4_full has no checkpoint"),
            (base_train, ["--budget-params", "d4_lowe", "--solve", "rank", "--dry-run"],
             "--budget-params d4_lowe: neither .*; did you mean d4_low"),
            (base_train, ["--budget-params", "../runs/d4_low", "--solve", "rank", "--dry-run"],
             "--budget-params ../runs/d4_low: neither")]:
        with pytest.raises(InputError, match=message):
            script.main(argv)


def test_a_default_tag_that_is_too_long_asks_for_one(train):
    with pytest.raises(InputError, match="--model-tag is missing, and 'd2_w32_map0-0.*at most 150 bytes"):
        train("--layer-map", ",".join(["0"] * 80 + ["1"]), "--model-tag", "")


def test_names_of_the_dashboard(train, tmp_path):
    for name in ("", "  ", "a\nb", "x" * 129):
        with pytest.raises(InputError,
                           match="argument --run: .*give W&B a name of 1 to 128 printable characters"):
            train("--run", name)
        with pytest.raises(InputError, match="argument --run: "):
            sweep.main([str(tmp_path / "e.toml"), "--run", name])


def test_points_of_an_experiment_are_named_by_the_same_rule(tmp_path, corpus_dir):
    def read(name):
        return read_experiment(
            tiny_experiment(tmp_path / "e.toml", f"[points.'{name}']\nattn-rank = 4\n", [1], corpus_dir))
    assert {point.tag for point in read("Märchen (2)").points} == {"e_full_s1", "e_Märchen (2)_s1"}
    for name in ("a/b", "..", "-x", "a:b", "x" * 151):
        with pytest.raises(InputError, match="points '.*: becomes the name of a folder"):
            read(name)
    with pytest.raises(InputError, match="point x*: this name is too long"):
        read("x" * 149)
