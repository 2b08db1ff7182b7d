"""Generate text with a trained model: it continues a prompt, token by token.

    python -m scripts.generate -p "Once upon a time"
    python -m scripts.generate --model-tag d20 --temperature 0.7 --top-k 50     # prompts from standard input

The text is printed to stdout as it is generated. Everything else is printed to stderr. The text ends after
--max-tokens, or where the model ends its document.
"""

import codecs
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nanochat import arguments, common, devices, metrics, processes
from nanochat.adapters.loading import load_model
from nanochat.arguments import real_number, whole_number
from nanochat.checkpoint_manager import step_or_newest
from nanochat.engine import Sampling, crop_to_context, generate
from nanochat.errors import InputError
from nanochat.naming import optional_tag, run_folder
from nanochat.run_files import read_summary, saved_steps


def print_note(text: str):
    print(text, file=sys.stderr, flush=True)


def newest_finished_run() -> str:
    finished = []
    for config in metrics.runs_dir().glob("*/config.json"):
        with contextlib.suppress(InputError):  # skip a damaged run
            if saved_steps(config.parent) and read_summary(config.parent)["status"] == "finished":
                finished.append((last_change(config.parent), config.parent.name))
    if not finished:
        raise InputError(
            f"{metrics.runs_dir()}: no finished run with a checkpoint; "
            "train one with scripts.base_train, or name a run with --model-tag"
        )
    return max(finished)[1]


def last_change(folder: Path) -> float:
    summary = folder / "summary.json"
    return (summary if summary.exists() else folder / "config.json").stat().st_mtime


def open_model(tag: str, step: int, device):
    """(model, the tokenizer it was trained with, step) of a run. step -1: its newest checkpoint.

    InputError if they do not belong together.
    """
    folder = run_folder("--model-tag", tag)
    step = step_or_newest(folder, step)
    model, tokenizer, _ = load_model(folder, step, device)
    return model.requires_grad_(False), tokenizer, step


class Text:
    """Decodes one row's tokens. A character that takes several tokens appears with the last of them."""

    def __init__(self, tokenizer):
        self.tokens = tokenizer.tokens
        self.text = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int | None) -> str:
        """The text that this token completes. None stands for the end. A special token has no text."""
        is_ordinary = token is not None and token < len(self.tokens)
        data = self.tokens[token] if is_ordinary else b""
        new = self.decoder.decode(data, final=token is None)
        self.text += new
        return new


def continue_prompt(model, tokenizer, prompt: str, args, dtype):
    """Print the prompt and its continuations: the first one as it grows, the others when all have ended."""
    tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    context = model.config.sequence_len
    cropped = crop_to_context(tokens, context)
    if len(cropped) < len(tokens):
        print_note(
            f"the prompt has {len(tokens) - 1} tokens, with BOS more than the context of {context}: "
            f"the model reads its last {len(cropped) - 1}"
        )
    texts = [Text(tokenizer) for _ in range(args.num_samples)]
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    stop = (tokenizer.bos_id,)
    count = 0
    print(prompt, end="", flush=True)
    started = first = time.perf_counter()
    for step in generate(model, [tokens], args.max_tokens, sampling, args.num_samples, stop, dtype):
        first = first if count else time.perf_counter()
        new = [text.add(token) if token is not None else "" for text, token in zip(texts, step)]
        print(new[0], end="", flush=True)
        count += sum(token is not None for token in step)
    seconds = time.perf_counter() - started
    print(texts[0].add(None), flush=True)
    for text in texts[1:]:
        text.add(None)
        print(f"\n{prompt}{text.text}", flush=True)
    print_note(
        f"{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tokens/s; "
        f"{1e3 * (first - started):.0f} ms to the first, after a prompt of {len(cropped)}"
    )


def parse(argv=None):
    parser = arguments.ArgumentParser("Continue a text with a trained model.")
    add = parser.add_argument
    add(
        "-p",
        "--prompt",
        default=None,
        help="text to continue; without it, read from standard input, a prompt a line, until an empty line",
    )
    add("--model-tag", type=optional_tag, default="", help="the run; '' = the newest finished one")
    add("--step", type=whole_number(0, off=-1), default=-1, help="checkpoint; -1 = the newest")
    add(
        "--num-samples", type=whole_number(1, 2**16), default=1, help="number of continuations of each prompt"
    )
    add(
        "--max-tokens",
        type=whole_number(1),
        default=256,
        help="the longest continuation; beyond the context the model rereads the last half of it",
    )
    add("--temperature", type=real_number(0), default=0.8, help="0 = always the likeliest token")
    add("--top-k", type=whole_number(0), default=0, help="draw from the k likeliest tokens; 0 = from all")
    add(
        "--top-p",
        type=real_number(0, 1),
        default=1.0,
        help="draw from the likeliest tokens that together have this probability",
    )
    add("--seed", type=whole_number(0), default=0, help="seed of the draws")
    arguments.device_flags(add, "of the computation; weights are float32")
    args = parser.parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("-p: the prompt is empty; give some text, or leave -p out and type it")
    if args.top_p == 0:
        raise InputError("--top-p 0: leaves no token; give a number above 0, up to 1")
    return args


def read_prompts() -> Iterator[str]:
    """The lines of standard input, until an empty one."""
    if sys.stdin is None:
        raise InputError(
            "-p: no prompt, and standard input is closed; give a prompt, or one a line on standard input"
        )
    if sys.stdin.isatty():
        print_note("type a line to continue, an empty one to end:")
    while (line := sys.stdin.readline()).strip():
        yield line.rstrip("\n")


def main(argv=None):
    args = parse(argv)
    tag = args.model_tag or newest_finished_run()
    device = processes.init_process(args.device_type, alone=True).device
    dtype = devices.compute_dtype(args.dtype, device.type)
    model, tokenizer, step = open_model(tag, args.step, device)
    model.to(dtype)  # once, and not at every token
    print_note(f"{tag}, step {step}{'' if args.model_tag else ' (the newest finished run)'}")
    for prompt in read_prompts() if args.prompt is None else [args.prompt]:
        continue_prompt(model, tokenizer, prompt, args, dtype)


if __name__ == "__main__":
    common.run_script(main, result_is_printed=True)
