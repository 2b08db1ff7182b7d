"""Training on from a checkpoint: its weights and shape, a fresh optimizer, and a record of where it began."""

import shlex

import pytest
import torch
from conftest import TINY, Killed, losses
from test_base_train import final_state, same

from nanochat import metrics
from nanochat.adapters.loading import load_model
from nanochat.checkpoint_manager import load_checkpoint
from nanochat.dataloader import Rows
from nanochat.dataset import open_corpus
from nanochat.errors import InputError
from nanochat.plan import parse_flags
from nanochat.report.configurations import configurations, paste_flags
from nanochat.sweep.trial import resolve
from nanochat.tokenizer import load_tokenizer
from scripts import base_train, materialize, tok_train

NO_SHAPE = TINY[TINY.index("--device-batch-size") :]


@pytest.fixture
def go_on(base_dir, corpus_dir):
    """go_on('TAG[:STEP]', '--flag', value, …, tag='name') -> the finished run."""

    def run(source, *flags, tag="on"):
        command = [*NO_SHAPE, "--data", str(corpus_dir), "--model-tag", tag, "--init-from", source]
        base_train.main([*command, *map(str, flags)])
        return metrics.load_run(metrics.runs_dir() / tag)

    return run


@pytest.fixture
def truncated(train):
    """The tag of a run cut by its energy, whose ranks differ from layer to layer, as flags cannot say."""
    train("--num-iterations", 12, "--window-pattern", "SL", "--n-kv-head", 1, tag="full")
    materialize.main(["--model-tag", "full", "--out-tag", "cut", "--energy", "0.5", "--lm-head-rank", "9"])
    return "cut"


def test_the_first_loss_is_that_of_the_checkpoint_and_the_run_says_where_it_began(
    truncated, go_on, corpus_dir
):
    run = go_on(truncated, "--seed", 5)
    source = metrics.load_run(metrics.runs_dir() / truncated)
    model, _, meta = load_model(metrics.runs_dir() / truncated, 12, "cpu")
    rows = Rows(open_corpus(str(corpus_dir)).train, load_tokenizer(), 32, 5)
    batch = torch.stack([torch.from_numpy(rows.training_row(k)) for k in range(8)])
    assert losses(run)[0] == pytest.approx(model(batch[:, :-1], batch[:, 1:]).item(), abs=1e-5)
    derived = run.config["derived"]
    flags = run.config["flags"]
    assert derived["source"] == {"tag": "cut", "step": 12, "sha256": meta["sha256"]}
    assert (
        derived["model"] == source.config["derived"]["model"]
        and len({len(set(r)) for r in derived["model"]["matrix_ranks"].values()}) > 1
    )
    assert flags["init_from"] == "cut:12" and (
        flags["depth"],
        flags["model_dim"],
        flags["window_pattern"],
        flags["max_seq_len"],
    ) == (2, 32, "SL", 32)
    assert run.summary["total_tokens"] == 6 * 256
    start, cut = configurations([run, source])
    words = shlex.split(paste_flags(start))
    assert words[words.index("--init-from") + 1] == "cut:12" and parse_flags(words).depth == 2, (
        "what the report gives to paste runs"
    )
    assert paste_flags(cut) == "made by scripts.materialize from full:12"


@pytest.mark.parametrize("stop", [1, 4])
def test_resuming_such_a_run_is_the_uninterrupted_run_to_the_bit(train, go_on, kill_after, stop):
    train("--attn-rank", 4, tag="low")
    straight = go_on("low", tag="straight")
    kill_after(stop)
    with pytest.raises(Killed):
        go_on("low", "--save-every", 1, tag="resumed")
    kill_after(None)
    resumed = go_on("low", "--save-every", 1, "--resume", "auto", tag="resumed")
    assert losses(resumed) == losses(straight) and same(final_state(resumed), final_state(straight))
    lines = (metrics.runs_dir() / "resumed/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6, (
        "no step was done twice: it went on from its own checkpoint, not again from the source's"
    )


def test_a_given_step_and_the_newest(train, go_on):
    train("--save-every", 3, tag="a")
    early = go_on("a:3", tag="early")
    late = go_on("a", tag="late")
    assert early.config["derived"]["source"]["step"] == 3 and late.config["derived"]["source"]["step"] == 6
    assert losses(late)[0] < losses(early)[0]
    assert parse_flags(["--init-from", "a"]).init_from == "a:6"
    as_in_a_sweep = (*NO_SHAPE, "--init-from", "a:3", "--vocab-size", "300")
    args, config, _ = resolve(as_in_a_sweep, 1)
    assert config.n_embd == args.model_dim == 32
    base_train.main([*NO_SHAPE, "--data", early.config["flags"]["data"], "--init-from", "a:3"])
    assert (metrics.runs_dir() / "d2_w32_from_a_3").is_dir(), "its own name, not the source's"


def test_what_does_not_fit_is_refused_before_anything_is_written(train, go_on, corpus_dir, tmp_path):
    source = train(tag="a")
    for where, flags, message in [
        ("b", (), "--init-from b: no such run in .*"),
        ("a:5", (), r"--init-from a:5: no checkpoint of step 5; there are: \[6\]"),
        ("a:x", (), "no checkpoint of step x"),
        ("", (), "--init-from '': becomes the name of a folder"),
        ("a", ("--depth", 20), "--depth: not with --init-from.*leave it out"),  # even where it is the default
        (
            "a",
            ("--attn-rank", 4, "--tie-embeddings"),
            "--tie-embeddings, --attn-rank: not with --init-from.*leave them out",
        ),
        ("a", ("--plan", "--budget-params", "1000"), "--budget-params, --plan: not with --init-from"),
    ]:
        with pytest.raises(InputError, match=message):
            go_on(where, *flags)
    with pytest.raises(InputError, match="--model-tag a: exists with another config: .*init_from"):
        go_on("a", tag="a")
    state = metrics.runs_dir() / "a/checkpoints/step_000006/__0_0.distcp"
    content = state.read_bytes()
    state.write_bytes(content[:-50])
    with pytest.raises(InputError, match="step_000006: damaged checkpoint"):
        go_on("a")
    state.write_bytes(content)

    tok_train.main(["--data", str(corpus_dir), "--vocab-size", "290"])
    message = "has a vocabulary of 300 tokens, here it is 290; put .*tokenizer.json in its place"
    with pytest.raises(InputError, match=message):
        go_on("a")
    text = "quick other words with more letters make another vocabulary, jumping over just as many ids"
    for name in ("a", "val"):
        (tmp_path / f"{name}.txt").write_text(f"{text} of the very same size " * 20)
    tok_train.main(["--data", str(tmp_path), "--vocab-size", "300"])
    tokenizer = source.config["derived"]["tokenizer_hash"]
    with pytest.raises(InputError, match=f"--init-from a:6: learned with tokenizer {tokenizer}"):
        go_on("a")
    assert not (metrics.runs_dir() / "on").exists() and load_checkpoint(metrics.runs_dir() / "a", 6)
