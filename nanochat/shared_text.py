"""The text of a run of several processes: process 0 lists it, and all have the same tokens of it."""

from nanochat.agreement import from_first
from nanochat.common import InputError, get_base_dir
from nanochat.dataset import Corpus
from nanochat.files import read_json
from nanochat.token_cache import META


def shared_text(place, open_text) -> Corpus:
    """The Corpus that open_text() opens in process 0, in all processes. Only that one hashes its files."""
    corpus = from_first(place, opened_and_hashed, open_text)
    return corpus if place[1] == 0 else corpus.announced()


def opened_and_hashed(open_text) -> Corpus:
    corpus = open_text()
    for split in ("train", "val"):
        corpus.fingerprint(split)  # each shard keeps its own
    return corpus


def confirm_caches(place, tokenizer, shards):
    """InputError on a process whose token caches, which are there by now, are not those of process 0."""
    if place[2] == 1:
        return
    root = get_base_dir() / "token_cache" / tokenizer.hash
    caches = {shard.fingerprint: cache_content(root / shard.fingerprint) for shard in shards}
    for fingerprint, there in from_first(place, dict, caches).items():
        here = caches[fingerprint]
        keys = [key for key in ("slots", "sha256") if here[key] and there[key] and here[key] != there[key]]
        if keys:
            raise InputError(
                f"{root / fingerprint}: other tokens than process 0 has "
                f"({keys[0]}: {here[keys[0]]}, there {there[keys[0]]}); "
                "remove that folder, and start again"
            )


def cache_content(folder) -> dict:
    """What meta.json of a token cache says of its content; earlier versions wrote no sum."""
    meta = read_json(folder / "meta.json", META)
    return {"slots": meta["slots"], "sha256": meta.get("sha256")}
