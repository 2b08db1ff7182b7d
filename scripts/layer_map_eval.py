"""What becomes of a trained model whose layers are executed in another order, or more than once, with no training: perplexity by layer map.

    python -m scripts.layer_map_eval --model-tag d4 --all-monotone 8 --out maps          every way to spread 4 layers over 8 positions: 35
    python -m scripts.layer_map_eval --model-tag d4 --maps "0,1,2,3,3 0,0,1,2,3" --random 20 --positions 8 --out maps
Writes layer_maps.csv and layer_maps.png: a row a map, best first, the model as it is among them.
"""
import csv
import io
import itertools
import math
import random
from pathlib import Path

from matplotlib import colormaps
from matplotlib.colors import ListedColormap

from nanochat import common, metrics
from nanochat.checkpoint_manager import load_model, step_or_newest
from nanochat.common import InputError, whole_number, write_atomic
from nanochat.factorize import with_layer_map
from nanochat.figures import new_figure, png
from nanochat.loss_eval import evaluate, validation_rows


# ---- maps -----------------------------------------------------------------------------------------------------------

def listed(text: str, layers: int) -> list[tuple[int, ...]]:
    """'0,1,1 0,0,1' -> [(0, 1, 1), (0, 0, 1)]. InputError for a layer that is not there."""
    maps = []
    for word in text.split():
        numbers = word.split(",")
        if not all(n.isdigit() and int(n) < layers for n in numbers):
            raise InputError(f"--maps {word}: give layers from 0 to {layers - 1}, separated by commas; spaces separate maps")
        maps.append(tuple(map(int, numbers)))
    return maps


def monotone(layers: int, positions: int) -> list[tuple[int, ...]]:
    """Every map that takes the layers in order, each at least once in a row: (positions - 1 over layers - 1) of them."""
    cuts = itertools.combinations(range(1, positions), layers - 1)  # where the next layer begins
    return [tuple(sum(place >= cut for cut in at) for place in range(positions)) for at in cuts]


def drawn(layers: int, positions: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Distinct random maps that are not monotone, any layer at any position."""
    rng, maps = random.Random(seed), []
    possible = layers**positions - math.comb(layers + positions - 1, positions)  # all but those in order
    while len(maps) < min(count, possible):
        one = tuple(rng.choices(range(layers), k=positions))
        if list(one) != sorted(one) and one not in maps:
            maps.append(one)
    return maps


# ---- figure ---------------------------------------------------------------------------------------------------------

def draw(rows: list[dict], layers: int):
    """Colour: the layer executed; perplexity at the right."""
    widest, line = max(len(row["map"]) for row in rows), 0.17
    fig = new_figure(2.6 + 0.34 * widest, 1.5 + line * len(rows))
    panel = fig.add_subplot()
    # from dark to light in equal steps of lightness, which a colour-blind reader and a printer keep apart
    colours = ListedColormap([colormaps["cividis"](i / max(1, layers - 1)) for i in range(layers)])
    grid = [list(row["map"]) + [float("nan")] * (widest - len(row["map"])) for row in rows]
    image = panel.imshow(grid, aspect="auto", cmap=colours, vmin=-0.5, vmax=layers - 0.5, interpolation="nearest")
    for y, row in enumerate(rows):
        words = f"{row['val/ppl']:.2f}" + ("  the model as it is" if row["as it is"] else "")
        panel.text(widest - 0.35, y, words, va="center", fontsize=7, fontweight="bold" if row["as it is"] else "normal")
    panel.set(xlabel="position in the stack", xticks=range(widest), yticks=[])
    panel.spines[:].set_visible(False)
    panel.set_title("validation perplexity, no training", loc="right", fontsize=9)
    key = fig.colorbar(image, ax=panel, ticks=range(layers), location="bottom", aspect=40, fraction=0.4 / (1.5 + line * len(rows)))
    key.set_label("layer executed")
    return fig


# ---- the script -----------------------------------------------------------------------------------------------------

def parse(argv):
    parser = common.ArgumentParser("Perplexity of a checkpoint whose layers are executed by other maps, with no training.")
    add = parser.add_argument
    add("--model-tag", required=True, help="the run")
    add("--step", type=whole_number(-1), default=-1, help="checkpoint; -1 = the newest")
    add("--maps", default="", help="maps, separated by spaces: '0,1,1,2,3 0,0,1,2,3'")
    add("--all-monotone", type=whole_number(1), default=None, metavar="POSITIONS", help="every map to so many positions that keeps the order of the layers")
    add("--random", type=whole_number(0), default=0, help="so many random maps that do not, to --positions")
    add("--positions", type=whole_number(2), default=None, help="of random maps; as many as the model has if not given")
    add("--seed", type=whole_number(0), default=0, help="of random maps")
    add("--eval-tokens", type=whole_number(-1), default=-1, help="validation tokens; -1 = as many as in the run")
    add("--device-batch-size", type=whole_number(1), default=32)
    add("--device-type", choices=["", "cuda", "cpu"], default="")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    add("--out", type=Path, default=None, help="folder of layer_maps.csv and layer_maps.png")
    args = parser.parse_args(argv)
    if not (args.maps or args.all_monotone or args.random):
        raise InputError("--maps, --all-monotone, --random: give at least one of them")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out}: is a file; give a folder")
    return args


def main(argv=None):
    args = parse(argv)
    folder = metrics.runs_dir() / args.model_tag
    run = metrics.load_run(folder)
    device = common.init_process(args.device_type)[0]
    dtype = common.compute_dtype(args.dtype, device.type)
    model, tokenizer, _ = load_model(folder, step_or_newest(folder, args.step), device)

    layers, own = model.config.n_layer, model.config.positions
    if args.all_monotone and args.all_monotone < layers:
        raise InputError(f"--all-monotone {args.all_monotone}: the model has {layers} layers; give at least as many positions")
    maps = [own, *listed(args.maps, layers), *(monotone(layers, args.all_monotone) if args.all_monotone else ()),
            *drawn(layers, args.positions or len(own), args.random, args.seed)]
    maps = list(dict.fromkeys(maps))
    eval_tokens = args.eval_tokens if args.eval_tokens >= 0 else run.config["flags"]["eval_tokens"]
    rows, count = validation_rows(run, tokenizer, model.config.sequence_len, eval_tokens)

    found = []
    for one in maps:
        values = evaluate(with_layer_map(model, one), rows, count, tokenizer.token_bytes(), args.device_batch_size, device, dtype)
        found.append({"map": one, "as it is": one == own, **values})
        print(f"ppl {values['val/ppl']:12.3f} | bpb {values['val/bpb']:.4f} | {','.join(map(str, one))}{'  as it is' if one == own else ''}", flush=True)
    if args.out:
        found.sort(key=lambda row: row["val/loss"])
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["map", "positions", "as_it_is", "val/loss", "val/ppl", "val/bpb"])
        writer.writerows([" ".join(map(str, row["map"])), len(row["map"]), int(row["as it is"]),
                          row["val/loss"], row["val/ppl"], row["val/bpb"]] for row in found)
        write_atomic(args.out / "layer_maps.csv", text.getvalue())
        write_atomic(args.out / "layer_maps.png", png(draw(found, layers)))
        print(f"written: {args.out}/layer_maps.csv and .png")


if __name__ == "__main__":
    common.run_script(main)
