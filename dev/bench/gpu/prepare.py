"""Makes the folder that call 2 trains on, from a folder of text; run it on a CPU, beforehand.

    bash dev/bench/gpu.sh prepare --data FOLDER

It copies the text, trains a tokenizer, and records the first losses on this CPU. The folder has to fit into
what travels to the card's machine (64 MiB). Tokens take more than compressed text: they are made there.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from gpu import text
from gpu.runner import Setting
from nanochat import common
from nanochat.arguments import ArgumentParser
from nanochat.dataset import open_corpus
from nanochat.errors import InputError
from nanochat.files import write_atomic
from nanochat.tokenizer import tokenizer_path
from scripts import tok_train

MAX_CHARS = "50000000"  # of the text that the tokenizer is trained on
MOST_BYTES = 56 * 2**20  # the repository travels too


def main(argv=None):
    args = flag_parser().parse_args(argv)
    out = args.out
    corpus = open_corpus(args.data)
    files = [path for split in (corpus.train, corpus.val) for shard in split for path in shard.paths]
    size = sum(path.stat().st_size for path in files)
    if size > MOST_BYTES:
        raise InputError(f"--data {args.data}: {size:,} bytes; {MOST_BYTES:,} can travel: give fewer files")
    shutil.rmtree(out / "text", ignore_errors=True)
    shutil.rmtree(out / "base", ignore_errors=True)
    (out / "text").mkdir(parents=True)
    for path in files:
        shutil.copy(path, out / "text")
    os.environ["NANOCHAT_BASE_DIR"] = str(out / "base")
    task = text.task_of(args.tiny)
    tok_train.main(
        ["--data", str(out / "text"), "--vocab-size", str(task.vocab_size), "--max-chars", MAX_CHARS]
    )
    shutil.copy(tokenizer_path(), out / "tokenizer.json")
    rows = text.training_rows(Setting("cpu", args.tiny, data=out), task)
    reference = text.first_losses(rows, task, torch.device("cpu"), torch.float32)
    reference |= {"torch": torch.__version__, "tokens": int(rows.starts[-1])}
    write_atomic(out / "reference.json", json.dumps(reference, indent=1) + "\n")
    shutil.rmtree(out / "base")  # its caches do not travel
    print(f"{out}: {size / 2**20:.1f} MiB of text, {reference['tokens']:,} training tokens")


def flag_parser():
    parser = ArgumentParser("Prepares call 2 of the ladder.")
    parser.add_argument("--data", required=True, help="a folder of text, as of scripts.base_train")
    parser.add_argument("--out", type=Path, default=Path("gpu_data"), help="the folder to make")
    parser.add_argument("--tiny", action="store_true", help="for call 2 with --tiny")
    return parser


if __name__ == "__main__":
    common.run_script(main)
