"""What becomes of a trained model whose layers are executed in another order, or more than once, with no training: perplexity by layer map.

    python -m scripts.layer_map_eval --model-tag d4 --all-monotone 8 --out maps          every way to spread 4 layers over 8 positions: 35
    python -m scripts.layer_map_eval --model-tag d4 --maps "0,0,1,2,3 solar mobilellm" --random 20 --positions 8 --out maps
    python -m scripts.layer_map_eval --model-tag d4 --second-tag d4b --maps "A:0,A:1,B:2,B:3 goliath" --out maps       layers of two runs of one shape
Writes layer_maps.csv and layer_maps.png: a row a map, best first, the model as it is among them.
"""

import csv
import io
import math
from pathlib import Path

from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from nanochat import common, metrics
from nanochat.adapters.loading import load_model
from nanochat.checkpoint_manager import step_or_newest
from nanochat.common import InputError, whole_number
from nanochat.files import check_out, write_atomic
from nanochat.flag_types import DEEPEST
from nanochat.gpt import GPT
from nanochat.layer_maps import (
    NAMED,
    check_same_shape,
    drawn,
    map_text,
    monotone,
    of_two,
    parse_map,
    with_copied_layers,
    with_layer_map,
)
from nanochat.loss_eval import evaluate, validation_rows
from nanochat.naming import optional_tag, run_folder, tag
from nanochat.report.plotting import new_figure, png

LARGEST_SIDE = 300  # inches of a figure: matplotlib draws no image of more than 65,536 dots
MOST_MAPS = 100_000  # at a thousandth of a second each that is minutes

# ---- figure ---------------------------------------------------------------------------------------------------------


def draw(rows: list[dict], layers: int, second_tag: str = ""):
    """Colour: the layer executed, hatched where it is the second run's; perplexity at the right."""
    widest = max(len(row["map"]) for row in rows)
    line = min(0.17, LARGEST_SIDE / len(rows))
    place = min(0.34, LARGEST_SIDE / widest)
    height = 1.5 + line * len(rows)
    fig = new_figure(2.9 + place * widest, height)
    panel = fig.add_subplot()
    # from dark to light in equal steps of lightness, which a colour-blind reader and a printer keep apart
    colours = ListedColormap([colormaps["cividis"](i / max(1, layers - 1)) for i in range(layers)])
    grid = [
        [layer % layers for layer in row["map"]] + [float("nan")] * (widest - len(row["map"])) for row in rows
    ]
    image = panel.imshow(
        grid, aspect="auto", cmap=colours, vmin=-0.5, vmax=layers - 0.5, interpolation="nearest"
    )
    for y, row in enumerate(rows):
        panel.text(
            widest - 0.35,
            y,
            f"{row['val/ppl']:.2f}  {row['name']}",
            va="center",
            fontsize=7,
            fontweight="bold" if row["as it is"] else "normal",
        )
        for x, layer in enumerate(row["map"]):
            if layer >= layers:
                ink = "white" if 2 * (layer % layers) < layers else "black"
                panel.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor=ink, linewidth=0)
                )
    panel.set(xlabel="position in the stack", xticks=range(0, widest, math.ceil(widest / 60)), yticks=[])
    panel.spines[:].set_visible(False)
    panel.set_title("validation perplexity, no training", loc="right", fontsize=9)
    key = fig.colorbar(
        image, ax=panel, ticks=range(layers), location="bottom", aspect=40, fraction=0.4 / height
    )
    key.set_label("layer executed" + f"\nhatched: of {second_tag}" * bool(second_tag))
    return fig


# ---- the script -----------------------------------------------------------------------------------------------------


def parse(argv):
    parser = common.ArgumentParser(
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
    add(
        "--maps",
        default="",
        help=f"maps, separated by spaces: '0,1,1,2,3 0,0,1,2,3', or by name: {', '.join(NAMED)} (of two runs)",
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
        help="so many random maps that do not, to --positions",
    )
    add(
        "--positions",
        type=whole_number(2, DEEPEST),
        default=None,
        help="of random maps; as many as the model has if not given",
    )
    add("--seed", type=whole_number(0), default=0, help="of random maps")
    add("--data", default="", help="where the run's text is now; '' = where the run read it")
    add(
        "--eval-tokens",
        type=whole_number(1, off=-1),
        default=-1,
        help="validation tokens; -1 = as many as in the run",
    )
    add("--device-batch-size", type=whole_number(1), default=32)
    common.device_flags(add, "of the evaluation; weights are float32")
    add("--out", type=Path, default=None, help="folder of layer_maps.csv and layer_maps.png")
    args = parser.parse_args(argv)
    if not (args.maps.strip() or args.all_monotone or args.random):
        raise InputError("--maps, --all-monotone, --random: give at least one of them")
    two = [word for word in args.maps.split() if of_two(word)]
    if two and not args.second_tag:
        raise InputError(
            f"--maps {two[0]}: takes layers of a second checkpoint; name its run with --second-tag"
        )
    if args.second_tag and not two:
        raise InputError(
            f"--second-tag {args.second_tag}: no map takes its layers; give --maps with B:0, B:1, …, or goliath"
        )
    if args.out:
        check_out("--out", args.out)
    return args


def second_model(second_tag: str, first: GPT, tokenizer, device) -> GPT:
    """The newest checkpoint of --second-tag. InputError if its layers cannot stand beside the first model's."""
    folder = run_folder("--second-tag", second_tag)
    flag = f"--second-tag {second_tag}"
    model, other, _ = load_model(folder, step_or_newest(folder, -1, "--second-tag"), device)
    if other.hash != tokenizer.hash:
        raise InputError(f"{flag}: has another tokenizer ({other.hash} there, {tokenizer.hash} here)")
    check_same_shape(first.config, model.config, flag)
    return model


def under(model: GPT, one: tuple[int, ...], second: GPT | None) -> GPT:
    """The model under a map; its layers are copied only where some are the second's."""
    return (
        with_layer_map(model, one)
        if max(one) < model.config.n_layer
        else with_copied_layers(model, one, second)
    )


def main(argv=None):
    args = parse(argv)
    folder = run_folder("--model-tag", args.model_tag)
    run = metrics.load_run(folder)
    world = common.init_process(args.device_type, alone=True)
    device = world.device
    dtype = common.compute_dtype(args.dtype, device.type)
    model, tokenizer, _ = load_model(folder, step_or_newest(folder, args.step), device)
    second = second_model(args.second_tag, model, tokenizer, device) if args.second_tag else None

    layers = model.config.n_layer
    own = model.config.positions
    if args.all_monotone and args.all_monotone < layers:
        raise InputError(
            f"--all-monotone {args.all_monotone}: the model has {layers} layers; give at least as many positions"
        )
    if args.all_monotone and math.comb(args.all_monotone - 1, layers - 1) > MOST_MAPS:
        raise InputError(
            f"--all-monotone {args.all_monotone}: "
            f"{layers} layers have more than {MOST_MAPS:,} such maps; give fewer positions"
        )
    maps = [
        *(parse_map(word, layers, "--maps") for word in args.maps.split()),
        *(monotone(layers, args.all_monotone) if args.all_monotone else ()),
        *drawn(layers, args.positions or len(own), args.random, args.seed),
    ]
    names = {named(layers): name for name, named in NAMED.items()}
    eval_tokens = args.eval_tokens if args.eval_tokens >= 0 else run.config["flags"]["eval_tokens"]
    eval_set = validation_rows(run, tokenizer, model.config.sequence_len, eval_tokens, args.data)

    todo = [(own, f"{args.model_tag} as it is", model)]
    found = []
    if second:
        todo.append(
            (
                tuple(layers + layer for layer in second.config.positions),
                f"{args.second_tag} as it is",
                second,
            )
        )
    todo += [(one, names.get(one, ""), None) for one in dict.fromkeys(maps) if one != own]
    for one, name, whole in todo:
        model_under_map = whole or under(model, one, second)
        values = evaluate(model_under_map, eval_set, args.device_batch_size, world, dtype)
        found.append({"map": one, "name": name, "as it is": whole is not None, **values})
        print(
            f"ppl {values['val/ppl']:12.3f} | bpb {values['val/bpb']:.4f} | {map_text(one, layers)}{f'  {name}' * bool(name)}",
            flush=True,
        )

    if args.out:
        found.sort(key=lambda row: row["val/loss"])
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["map", "positions", "name", "as_it_is", "val/loss", "val/ppl", "val/bpb"])
        writer.writerows(
            [
                map_text(row["map"], layers).replace(",", " "),
                len(row["map"]),
                row["name"],
                int(row["as it is"]),
                row["val/loss"],
                row["val/ppl"],
                row["val/bpb"],
            ]
            for row in found
        )
        write_atomic(args.out / "layer_maps.csv", text.getvalue())
        write_atomic(args.out / "layer_maps.png", png(draw(found, layers, args.second_tag)))
        print(f"written: {args.out}/layer_maps.csv and .png")


if __name__ == "__main__":
    common.run_script(main)
