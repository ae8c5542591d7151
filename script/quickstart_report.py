"""The table and the figure that end script/quickstart.sh.

python script/quickstart_report.py FOLDER --seconds PLAIN DIVERSE PAPER

FOLDER holds `plain`, `diverse` and `paper`, output folders of main.py; FOLDER/quickstart.png is written.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

RUNS = ("plain", "diverse", "paper")
STYLES = {
    "plain": {"color": "#4d4d4d", "linestyle": "--"},
    "diverse": {"color": "#0072b2", "linestyle": "-"},
    "paper": {"color": "#d55e00", "linestyle": "-."},
}
PATCHES, SIGNED, HEADS = "test_patch.pairwise_cosine@last", "test_patch.cosine@last", "test_attn.pairwise_cosine@0"
PANELS = {
    "test_loss": "test cross-entropy (nats)",
    HEADS: "head cosine, mean |cos|",
    PATCHES: "patch cosine, mean |cos|",
    SIGNED: "patch cosine, signed",
}

Log = dict[str, list[float]]


def read_log(path: Path) -> Log:
    """The columns of a log.txt, one value per epoch."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {key: [line[key] for line in lines] for key in ("epoch", "test_acc1", *PANELS)}


def describe_model(args: dict[str, Any]) -> str:
    """One line on the model and the data, from a run's args.yaml."""
    options = args["model_kwargs"]
    size = args["input_size"]
    patches = (size // options["patch_size"]) ** 2
    return (
        f"ViT of {options['depth']} blocks, {options['embed_dim']} wide, {options['num_heads']} heads, "
        f"{patches} patches; scikit-learn's digits at {size} x {size} pixels"
    )


def describe_device() -> str:
    """What main.py's --device auto takes here."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "mps" if torch.backends.mps.is_available() else f"cpu, {torch.get_num_threads()} thread(s)"


def table(logs: dict[str, Log], seconds: dict[str, float]) -> str:
    """A row per run: the last epoch's numbers, and the seconds that the run took."""
    columns = ("top-1 %", "best", "patch cosine", "signed", "head cosine", "seconds")
    header = " " * 8 + "".join(f"{column:>14}" for column in columns)
    rows = []
    for run, log in logs.items():
        accuracies = f"{log['test_acc1'][-1]:14.2f}{max(log['test_acc1']):14.2f}"
        cosines = "".join(f"{log[key][-1]:14.3f}" for key in (PATCHES, SIGNED, HEADS))
        rows.append(f"{run:8}{accuracies}{cosines}{seconds[run]:14.0f}")
    return "\n".join([header, "-" * len(header), *rows])


def draw_panel(axes: Axes, logs: dict[str, Log], key: str) -> None:
    """One quantity of all runs over the epochs."""
    for run, log in logs.items():
        axes.plot([epoch + 1 for epoch in log["epoch"]], log[key], label=run, linewidth=1.8, **STYLES[run])
    axes.set_ylabel(PANELS[key])
    axes.set_ylim(0, None if key == "test_loss" else 1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw(logs: dict[str, Log], path: Path) -> None:
    """The figure: loss and similarities over the epochs."""
    figure, grid = plt.subplots(2, 2, figsize=(7.2, 5.2), sharex=True, layout="constrained")
    for axes, key in zip(grid.flat, PANELS, strict=True):
        draw_panel(axes, logs, key)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(logs), frameon=False
    )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare the runs of script/quickstart.sh.")
    parser.add_argument("folder", type=Path, help="holds plain/, diverse/ and paper/")
    parser.add_argument(
        "--seconds", type=float, nargs=len(RUNS), required=True, metavar=tuple(map(str.upper, RUNS))
    )
    args = parser.parse_args(argv)
    logs = {run: read_log(args.folder / run / "log.txt") for run in RUNS}
    settings = yaml.safe_load((args.folder / "plain" / "args.yaml").read_text())
    figure = args.folder / "quickstart.png"
    draw(logs, figure)

    print("Small scale, one seed: a demonstration of the method, not evidence for it.")
    print(f"model:  {describe_model(settings)}")
    print(f"device: {describe_device()}; {len(logs['plain']['epoch'])} epochs, seed {settings['seed']}\n")
    print(table(logs, dict(zip(RUNS, args.seconds, strict=True))))
    print(
        "\ntop-1: of the last epoch, and the best of all epochs, on the 360 test images\n"
        "patch cosine: mean |cos| between different patches of an image, last block, before the final norm\n"
        "signed: mean cos between patches, the form that `diverse` trains, as the reference's code does; opposite\n"
        "patches cancel out. `paper` trains the mean |cos|\n"
        "head cosine: mean |cos| between the attention maps of different heads of block 0\n"
        "all on the test images; 1 is fully redundant\n"
    )
    for run in RUNS:
        print(f"{run + ':':8} {args.folder / run}/ (checkpoint.pth, checkpoint_best.pth, log.txt, args.yaml)")
    print(f"figure:  {figure}")


if __name__ == "__main__":
    main()
