"""The section of the page on runs that train only a part of their parameters: adapters and subspaces."""

from nanochat.report import plotting
from nanochat.report.adapter_figures import draw_adapter_curves, draw_final_ranks, draw_untrained
from nanochat.report.configurations import Configuration, finished
from nanochat.report.subspace_figures import draw_subspaces
from nanochat.report.trained_figures import draw_trained

CAPTIONS = {
    "trained.png": "Final loss against the trained parameters and against the bits to store. Circles are "
    "trained from scratch. Squares are adapters of a trained model: only what is stored beside that model "
    "counts, not the model and not its training. Uniform and unigram: the loss of equal probabilities for "
    "all tokens, and of the tokens' frequencies alone.",
    "subspace.png": "Final loss against the dimension of the random subspace. Dashed: all weights trained, "
    "with the spread over seeds. Dotted: 90% of the way from the untrained model's loss to that one.",
    "adalora_ranks.png": "AdaLoRA's final ranks, means over seeds; bars: sums by layer and by matrix. For an "
    "encoder fine-tuned on language understanding, Zhang et al. (arXiv 2303.10512) found the most rank in "
    "upper layers and in the MLP.",
    "untrained.png": "Does a layer map's perplexity before any training predict the perplexity after its "
    "adapter is trained? Each point is a layer map.",
    "adapted.png": "Validation loss of adapters, means over seeds. Step 0 is the base model with its layer "
    "map, before the adapter is trained.",
}


def method_section(configs: list[Configuration], measure: str) -> tuple[list[tuple], dict]:
    """(blocks of the page, {file name: (PNG bytes, hotspots)}) of the finished runs.

    Both are empty if every run trains all its parameters. measure: "loss" if losses may be compared; else
    only AdaLoRA's ranks are shown.
    """
    configs = [c for c in configs if any(map(finished, c.runs))]
    if not any(c.method for c in configs):
        return [], {}
    draw_functions = [draw_final_ranks]
    if measure == "loss":
        draw_functions = [draw_trained, draw_subspaces, draw_untrained, draw_adapter_curves, draw_final_ranks]
    blocks = [("heading", "What is trained")]
    figures = {}
    for draw in draw_functions:
        result = draw(configs)
        if result:
            name, figure, more_blocks = result
            figures[name] = plotting.png_with_hotspots(*figure)
            blocks += [("figure", name, CAPTIONS[name]), *more_blocks]
    return (blocks, figures) if figures else ([], {})
