"""Perplexity of a trained model whose layers run in another order, or more than once, without training.

    # all 35 ways to spread 4 layers over 8 positions in order
    python -m scripts.layer_map_eval --model-tag d4 --all-monotone 8 --out maps
    # maps by name or by number, and random ones
    python -m scripts.layer_map_eval --model-tag d4 --maps "0,0,1,2 solar" --random 9 --positions 8 --out maps
    # layers of two runs of one shape
    python -m scripts.layer_map_eval --model-tag d4 --second-tag d4b --maps "A:0,A:1,B:2,B:3" --out maps

Writes layer_maps.csv and layer_maps.png: a row for each map, the best first, and the model as it is.
"""

import csv
import io
import math
from pathlib import Path

from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from nanochat import arguments, common, devices, layer_maps, metrics, processes
from nanochat.adapters.loading import load_model
from nanochat.arguments import whole_number
from nanochat.checkpoint_manager import step_or_newest
from nanochat.errors import InputError
from nanochat.files import check_out, write_atomic
from nanochat.flag_types import DEEPEST
from nanochat.gpt import GPT
from nanochat.loss_eval import evaluate, validation_rows
from nanochat.naming import optional_tag, run_folder, tag
from nanochat.report.plotting import new_figure, png

LARGEST_SIDE = 300  # inches of a figure: matplotlib draws at most 65,536 dots
LARGEST_FAMILY = 100_000  # maps of --all-monotone: minutes, at a thousandth of a second for each


def main(argv=None):
    args = parse(argv)
    folder = run_folder("--model-tag", args.model_tag)
    run = metrics.load_run(folder)
    world = processes.init_process(args.device_type, alone=True)
    device = world.device
    dtype = devices.compute_dtype(args.dtype, device.type)
    model, tokenizer, _ = load_model(folder, step_or_newest(folder, args.step), device)
    second = second_model(args.second_tag, model, tokenizer, device) if args.second_tag else None
    maps = maps_to_try(args, model)
    eval_tokens = args.eval_tokens if args.eval_tokens >= 0 else run.config["flags"]["eval_tokens"]
    eval_set = validation_rows(run, tokenizer, model.config.sequence_len, eval_tokens, args.data)

    layers = model.config.n_layer
    original = model.config.positions
    candidates = [(original, f"{args.model_tag} as it is", model)]
    if second:
        second_map = tuple(layers + layer for layer in second.config.positions)
        candidates.append((second_map, f"{args.second_tag} as it is", second))
    names = {make_map(layers): name for name, make_map in layer_maps.NAMED_MAPS.items()}
    candidates += [(layer_map, names.get(layer_map, ""), None) for layer_map in maps if layer_map != original]

    results = []
    for layer_map, name, unchanged in candidates:
        candidate = unchanged or model_under_map(model, layer_map, second)
        values = evaluate(candidate, eval_set, args.device_batch_size, world, dtype)
        results.append({"map": layer_map, "name": name, "as it is": unchanged is not None, **values})
        text = f"{layer_maps.map_text(layer_map, layers)}  {name}".rstrip()
        print(f"ppl {values['val/ppl']:12.3f} | bpb {values['val/bpb']:.4f} | {text}", flush=True)

    if args.out:
        results.sort(key=lambda result: result["val/loss"])
        write_atomic(args.out / "layer_maps.csv", csv_text(results, layers))
        write_atomic(args.out / "layer_maps.png", png(draw(results, layers, args.second_tag)))
        print(f"written: {args.out}/layer_maps.csv and .png")


# ---- flags -------------------------------------------------------------------------------------------------


def parse(argv=None):
    args = flag_parser().parse_args(argv)
    check_flags(args)
    return args


def flag_parser():
    parser = arguments.ArgumentParser(
        "Perplexity of a checkpoint whose layers are executed by other maps, with no training."
    )
    add = parser.add_argument
    add("--model-tag", type=tag, required=True, help="the run")
    add("--step", type=whole_number(0, off=-1), default=-1, help="checkpoint; -1 = the newest")
    add(
        "--second-tag",
        type=optional_tag,
        default="",
        metavar="TAG",
        help="a run of the same shape and tokenizer, whose newest checkpoint is B in maps such as "
        "A:0,A:1,B:1",
    )
    names = ", ".join(layer_maps.NAMED_MAPS)
    add(
        "--maps",
        default="",
        help=f"maps, separated by spaces: '0,1,1,2,3 0,0,1,2,3', or by name: {names} (of two runs)",
    )
    add(
        "--all-monotone",
        type=whole_number(1, DEEPEST),
        default=None,
        metavar="POSITIONS",
        help="every map to so many positions that keeps the order of the layers",
    )
    add(
        "--random",
        type=whole_number(0, 10_000),
        default=0,
        help="number of random maps, to --positions, that do not keep the order",
    )
    add(
        "--positions",
        type=whole_number(2, DEEPEST),
        default=None,
        help="positions of random maps; default: as many as the model has",
    )
    add("--seed", type=whole_number(0), default=0, help="of random maps")
    add("--data", default="", help="where the run's text is now; '' = where the run read it")
    add(
        "--eval-tokens",
        type=whole_number(1, off=-1),
        default=-1,
        help="validation tokens; -1 = as many as in the run",
    )
    add("--device-batch-size", type=whole_number(1), default=32, help="rows a pass")
    arguments.device_flags(add, "of the evaluation; weights are float32")
    add("--out", type=Path, default=None, help="folder of layer_maps.csv and layer_maps.png")
    return parser


def check_flags(args):
    """InputError if the flags do not fit together."""
    if not (args.maps.strip() or args.all_monotone or args.random):
        raise InputError("--maps, --all-monotone, --random: give at least one of them")
    two_run_maps = [text for text in args.maps.split() if layer_maps.takes_two_runs(text)]
    if two_run_maps and not args.second_tag:
        raise InputError(
            f"--maps {two_run_maps[0]}: takes layers of a second checkpoint; name its run with --second-tag"
        )
    if args.second_tag and not two_run_maps:
        raise InputError(
            f"--second-tag {args.second_tag}: no map takes its layers; "
            "give --maps with B:0, B:1, …, or goliath"
        )
    if args.out:
        check_out("--out", args.out)


def maps_to_try(args, model: GPT) -> list[tuple[int, ...]]:
    """The maps that the flags ask for, each once. InputError for maps that do not fit the model."""
    layers = model.config.n_layer
    maps = [layer_maps.parse_map(text, layers, "--maps") for text in args.maps.split()]
    if args.all_monotone:
        if args.all_monotone < layers:
            raise InputError(
                f"--all-monotone {args.all_monotone}: the model has {layers} layers; "
                "give at least as many positions"
            )
        if math.comb(args.all_monotone - 1, layers - 1) > LARGEST_FAMILY:
            raise InputError(
                f"--all-monotone {args.all_monotone}: {layers} layers have more than {LARGEST_FAMILY:,} "
                "such maps; give fewer positions"
            )
        maps += layer_maps.monotone_maps(layers, args.all_monotone)
    positions = args.positions or len(model.config.positions)
    maps += layer_maps.random_maps(layers, positions, args.random, args.seed)
    return list(dict.fromkeys(maps))


# ---- models ------------------------------------------------------------------------------------------------


def second_model(second_tag: str, first: GPT, tokenizer, device) -> GPT:
    """The newest checkpoint of --second-tag. InputError if its layers do not fit the first model's."""
    folder = run_folder("--second-tag", second_tag)
    flag = f"--second-tag {second_tag}"
    model, other, _ = load_model(folder, step_or_newest(folder, -1, "--second-tag"), device)
    if other.hash != tokenizer.hash:
        raise InputError(f"{flag}: has another tokenizer ({other.hash} there, {tokenizer.hash} here)")
    layer_maps.check_same_shape(first.config, model.config, flag)
    return model


def model_under_map(model: GPT, layer_map: tuple[int, ...], second: GPT | None) -> GPT:
    """The model under a map. Layers are copied only if the map has layers of the second model."""
    if max(layer_map) < model.config.n_layer:
        return layer_maps.with_layer_map(model, layer_map)
    return layer_maps.with_copied_layers(model, layer_map, second)


# ---- files -------------------------------------------------------------------------------------------------


def csv_text(results: list[dict], layers: int) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measured = ("val/loss", "val/ppl", "val/bpb")
    writer.writerow(["map", "positions", "name", "as_it_is", *measured])
    for result in results:
        map_text = layer_maps.map_text(result["map"], layers).replace(",", " ")
        values = [result[key] for key in measured]
        writer.writerow([map_text, len(result["map"]), result["name"], int(result["as it is"]), *values])
    return text.getvalue()


def draw(results: list[dict], layers: int, second_tag: str = ""):
    """A row of coloured fields for each map: the executed layers; those of the second run are hatched."""
    longest = max(len(result["map"]) for result in results)
    row_height = min(0.17, LARGEST_SIDE / len(results))
    field_width = min(0.34, LARGEST_SIDE / longest)
    height = 1.5 + row_height * len(results)
    fig = new_figure(2.9 + field_width * longest, height)
    ax = fig.add_subplot()
    # equal steps of lightness from dark to light: also colour-blind readers and printers distinguish them
    colours = ListedColormap([colormaps["cividis"](i / max(1, layers - 1)) for i in range(layers)])
    grid = []
    for result in results:
        executed = [layer % layers for layer in result["map"]]
        grid.append(executed + [math.nan] * (longest - len(executed)))
    scale = {"cmap": colours, "vmin": -0.5, "vmax": layers - 0.5}
    image = ax.imshow(grid, aspect="auto", interpolation="nearest", **scale)
    for y, result in enumerate(results):
        weight = "bold" if result["as it is"] else "normal"
        text = f"{result['val/ppl']:.2f}  {result['name']}"
        ax.text(longest - 0.35, y, text, va="center", fontsize=7, fontweight=weight)
        for x, layer in enumerate(result["map"]):
            if layer >= layers:
                ink = "white" if 2 * (layer % layers) < layers else "black"
                field = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor=ink, lw=0)
                ax.add_patch(field)
    ax.set(xlabel="position in the stack", xticks=range(0, longest, math.ceil(longest / 60)), yticks=[])
    ax.spines[:].set_visible(False)
    ax.set_title("validation perplexity, no training", loc="right", fontsize=9)
    ticks = range(layers)
    key = fig.colorbar(image, ax=ax, ticks=ticks, location="bottom", aspect=40, fraction=0.4 / height)
    label = "layer executed"
    if second_tag:
        label += f"\nhatched: of {second_tag}"
    key.set_label(label)
    return fig


if __name__ == "__main__":
    common.run_script(main)
