"""Loading the model of any run: fully trained, trained in a subspace, or a base model with an adapter."""

from pathlib import Path

import torch

from nanochat import recompute
from nanochat.adapters.attach import attach_saved
from nanochat.checkpoint_files import load_weights
from nanochat.checkpoint_manager import fitting_together, load_with_tokenizer
from nanochat.errors import InputError
from nanochat.gpt import GPT, GPTConfig
from nanochat.layer_maps import stacked
from nanochat.naming import check_tag
from nanochat.run_files import step_folder
from nanochat.subspace.model import restore

ADAPTER = "adapter"  # the adapter's name in the models of adapter runs


def load_model(run_folder: Path, step: int, device="cpu", **changes) -> tuple:
    """(model, the tokenizer it was trained with, meta.json's content) of one checkpoint.

    The base of an adapter run is in its own run folder, beside this one. changes: to the model's config, such
    as `recompute`. InputError if the parts do not belong together.
    """
    state, tokenizer, meta = load_with_tokenizer(run_folder, step, device)
    with fitting_together(step_folder(run_folder, step)):
        if "adapter" in meta:
            model = load_adapted(run_folder.parent, meta["adapter"], state["adapter"], device, **changes)
            return model, tokenizer, meta
        with torch.device(device):
            model = GPT(GPTConfig(**meta["model"] | changes))
        if "subspace" in meta:
            restore(model, meta["subspace"], state["model"])
        else:
            load_weights(model, state["model"])
        recompute.apply(model)
    return model, tokenizer, meta


def load_adapted(runs: Path, description: dict, tensors: dict, device, **changes) -> GPT:
    """The base model of an adapter run with its adapter.

    description, tensors: the entries "adapter" of the checkpoint, in meta.json and in its state. description:
    {"description" (see `attach.describe`), "origin": {"bases", "layer_map", "tied"}}. layer_map: the layer at
    each position; [] stands for the order of the base.
    """
    origin = description["origin"]
    models = load_bases(runs, origin["bases"], device, **changes)
    model = stacked(*models, layers=tuple(origin["layer_map"]), tied=origin["tied"])
    attach_saved(model, ADAPTER, description["description"], tensors)
    return model


def load_bases(runs: Path, bases: list[dict], device="cpu", **changes) -> list[GPT]:
    """The models that an adapter run starts from. bases: {"tag", "step", "sha256"} of each checkpoint.

    InputError if a checkpoint has another SHA-256 now.
    """
    models = []
    for base in bases:
        check_tag("the base that meta.json names:", base.get("tag"))
        folder = runs / base["tag"]
        model, _, meta = load_model(folder, base["step"], device, **changes)
        if meta["sha256"] != base["sha256"]:
            raise InputError(
                f"{folder}: step {base['step']} is another base than the adapter was trained on (its sum is "
                f"{meta['sha256'][:12]}, that one's {base['sha256'][:12]}); restore that checkpoint, or "
                "train the adapter again"
            )
        models.append(model)
    return models
