"""What a trained network's attention contributes: mAP with SONA's output replaced, in README.md.

From the repository's folder, for runs of study.py or train.py:

    PYTHONPATH=. python .github/benchmarks/attention.py RUN [RUN ...]

It prints a row of a Markdown table for each run. Nothing is retrained. The columns:
    strongest    a position's strongest attention weight x HW (1 if uniform), the median
    spread       root mean square deviation of p(z) from its mean over positions, over that mean
    as trained   mAP, as are all columns from here on
    averaged     every row of the attention uniform, so that z is the mean of g over positions
    constant     p(z) is one vector, its mean over the positions of all training images
    removed      SONA(x) = x
    re-estimated ...
                 the same, after the running statistics of all batch norms have been recomputed from
                 the training images, without augmentation and drop layer. The constant has no such
                 column: if the first layers of the next stage are 1 x 1 convolutions, their batch
                 norms absorb it, as if SONA were removed
A run without SONA has only two of them. In a run with several SONA modules the first is changed.

    PYTHONPATH=. python .github/benchmarks/attention.py --bound RUN [RUN ...]

prints instead, of each run's first 32 queries, at the size that it was trained at and at 384 x 128,
and before of a network that starts (random weights, training mode), on the first run's queries:
    mean v, largest v  population variance of theta(x) over channels: its mean over the positions of
                       an image, and its maximum
    typical row        largest over smallest attention weight of a row, the median over its rows
    most uneven row    the maximum over its rows
    bound              exp(2 v / sqrt(d)) with the largest v: no row can be more uneven (README.md)
All are medians over images.

    PYTHONPATH=. python .github/benchmarks/attention.py --draw PNG RUN RUN

draws the attention of two runs in one query image, on one colour scale, and nothing else.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import study  # noqa: F401, names the placements of its rows
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import ImageDataset, Split, load_dataset, normalize, read_image
from evaluate import POINTS, evaluate, load_run, sona_input
from model import SONA, SONANet

COLUMNS = [
    "run",
    "strongest",
    "spread",
    "as trained",
    "averaged",
    "constant",
    "removed",
    "re-estimated",
    "re-estimated averaged",
    "re-estimated removed",
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data-dir", help="folder that holds the data sets [as in training]")
    parser.add_argument("--bound", action="store_true")
    parser.add_argument("--draw", metavar="PNG")
    parser.add_argument("--query", type=int, default=0, help="the query to draw [%(default)s]")
    args = parser.parse_args()
    if args.draw:
        draw(args.runs, args.data_dir, args.query).save(args.draw)
        return
    if args.bound:
        print_bounds(args.runs, args.data_dir)
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for run in args.runs:
        network, settings = load_run(run)
        splits = load_dataset(settings["dataset"], args.data_dir or settings["data_dir"])
        cells = measure(network, splits, settings["height"], settings["width"])
        row = [Path(run).name, *(cells.get(column, "") for column in COLUMNS[1:])]
        print(f"| {' | '.join(row)} |", flush=True)


# ---------- The table -----------------------------------------------------------------------------


def measure(
    network: nn.Module, splits: dict[str, Split], height: int, width: int, workers: int = 0
) -> dict[str, str]:
    """The cells of a network's row, by column. Changes its batch norms' running statistics."""
    train = splits["train"]
    training_images = ImageDataset(train.paths, train.labels, height, width)

    def mean_ap() -> str:
        ranking = evaluate(network, splits["query"], splits["gallery"], height, width, workers)
        return f"{100 * ranking.mean_ap:.2f}"

    def batches() -> DataLoader:  # shuffled, so that each has many identities
        generator = torch.Generator().manual_seed(0)
        return DataLoader(
            training_images, 64, shuffle=True, generator=generator, num_workers=workers
        )

    sona = next((module for module in network.modules() if isinstance(module, SONA)), None)
    if sona is None:
        cells = {"as trained": mean_ap()}
        reestimate_batch_norms(network, batches())
        return cells | {"re-estimated": mean_ap()}

    cells = pattern(network, splits["query"].paths[:200], height, width)
    constant = mean_change(network, sona, batches())
    forwards = {
        "as trained": sona.forward,
        "averaged": lambda x: x + sona.p(sona.g(x).mean((2, 3), keepdim=True)),
        "constant": lambda x: x + constant,
        "removed": lambda x: x,
    }
    for column, forward in forwards.items():
        sona.forward = forward
        cells[column] = mean_ap()
    for column in ("as trained", "averaged", "removed"):
        sona.forward = forwards[column]
        reestimate_batch_norms(network, batches())
        cells[f"re-estimated {column}".removesuffix(" as trained")] = mean_ap()
    return cells


@torch.inference_mode()
def pattern(network: nn.Module, paths: list[str], height: int, width: int) -> dict[str, str]:
    """How much the attention and p(z) differ between positions, on test images."""
    device = next(network.parameters()).device
    images = torch.stack([image for image, _ in ImageDataset(paths, paths, height, width)])
    sona, x = sona_input(network, normalize(images.to(device)))
    strongest = sona.attention(x).amax(2) * x[0, 0].numel()  # (B, HW), 1 where uniform
    change = (sona(x) - x).flatten(2)  # p(z): (B, C, HW)
    mean = change.mean(2, keepdim=True).expand_as(change)
    spread = (change - mean).norm() / mean.norm()
    return {"strongest": f"{strongest.median():.3f}", "spread": f"{spread:.1%}"}


@torch.inference_mode()
def mean_change(network: nn.Module, sona: SONA, batches: DataLoader) -> Tensor:
    """The mean of p(z) over all positions of all images, (C, 1, 1)."""
    device = next(network.parameters()).device
    sums = []
    hook = sona.p.register_forward_hook(
        lambda _module, _inputs, change: sums.append(change.mean((2, 3)).sum(0))
    )
    for images, _ in batches:
        network(normalize(images.to(device)))
    hook.remove()
    return sum(sums)[:, None, None] / len(batches.dataset)


@torch.inference_mode()
def reestimate_batch_norms(network: nn.Module, batches: DataLoader) -> None:
    """Running statistics anew: the average over batches, everything else in eval mode."""
    device = next(network.parameters()).device
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the plain average
            module.train()
    for images, _ in batches:
        network(normalize(images.to(device)))
    network.eval()


# ---------- The bound -----------------------------------------------------------------------------


def print_bounds(runs: list[str], data_dir: str | None) -> None:
    columns = ["run", "size", "mean v", "largest v", "typical row", "most uneven row", "bound"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for i, run in enumerate(runs):
        network, settings = load_run(run)
        splits = load_dataset(settings["dataset"], data_dir or settings["data_dir"])
        paths = splits["query"].paths[:32]
        sizes = (settings["height"], settings["width"]), (384, 128)
        if i == 0:
            torch.manual_seed(0)
            start = SONANet(100).train()
            for size in sizes:
                print_bound("start", start, paths, *size)
        for size in sizes:
            print_bound(Path(run).name, network, paths, *size)


@torch.inference_mode()
def print_bound(name: str, network: nn.Module, paths: list[str], height: int, width: int) -> None:
    """A row of the table, for a network in training or eval mode."""
    images = torch.stack([image for image, _ in ImageDataset(paths, paths, height, width)])
    sona, x = sona_input(network, normalize(images))
    v = sona.centred_theta(x).square().mean(2)  # (B, HW)
    weights = sona.attention(x)  # (B, HW, HW)
    ratios = weights.amax(2) / weights.amin(2)  # (B, HW)
    largest = v.amax(1)
    d = sona.g.out_channels
    bounds = (2 * sona.scale * d * largest).exp()  # the scale is d^-1.5, or another power
    assert (ratios <= bounds[:, None] * 1.0001).all()
    figures = [v.mean(1), largest, ratios.median(1).values, ratios.amax(1), bounds]
    cells = [name, f"{height} x {width}", *(f"{figure.median():.3g}" for figure in figures)]
    print(f"| {' | '.join(cells)} |", flush=True)


# ---------- The picture ---------------------------------------------------------------------------

PANEL = (128, 256)  # width and height of an image
HIGH = 32  # the end of the colour scale, which begins at 1 / HIGH
# From dark to bright, as perceived, so that the scale reads in grey, too.
COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])


def draw(runs: list[str], data_dir: str | None, query: int) -> Image.Image:
    """A row of panels per run: how strongly each of POINTS attends to each position."""
    captions = []
    maps = []  # of each run: point -> (h, w), weights over the uniform one
    for run in runs:
        network, settings = load_run(run)
        splits = load_dataset(settings["dataset"], data_dir or settings["data_dir"])
        path = splits["query"].paths[query]
        maps.append(weights_of_points(network, path, settings["height"], settings["width"]))
        sona = next(module for module in network.modules() if isinstance(module, SONA))
        power = math.log(sona.scale) / math.log(sona.g.out_channels)
        captions.append(f"scale d^{power:.1f}")
    photo = TF.to_pil_image(read_image(path)).resize(PANEL)
    column_width = PANEL[0] + 8
    row_height = PANEL[1] + 68
    size = (column_width * len(POINTS) + 8, row_height * len(runs) + 48)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for i, (caption, row) in enumerate(zip(captions, maps, strict=True)):
        top = i * row_height
        pen.text((8, top + 6), caption, "black", font_size=16)
        for j, (name, weights) in enumerate(row.items()):
            left = 8 + j * column_width
            picture.paste(panel(photo, share_of_scale(weights), POINTS[name]), (left, top + 28))
            below = f"{name}\n{weights.min():.2g} to {weights.max():.3g}"
            pen.text((left, top + PANEL[1] + 30), below, "black", font_size=12)

    # the common scale
    top = size[1] - 40
    bar = Image.fromarray(np.tile(colour(np.linspace(0, 1, size[0] - 16)), (14, 1, 1)))
    picture.paste(bar, (8, top))
    for weight, text, anchor in [
        (1 / HIGH, f"1/{HIGH} of uniform", "la"),
        (1, "uniform", "ma"),
        (HIGH, f"{HIGH} x uniform", "ra"),
    ]:
        x = 8 + (size[0] - 16) * share_of_scale(np.array(weight))
        pen.text((x, top + 18), text, "black", font_size=14, anchor=anchor)
    return picture


def share_of_scale(weights: np.ndarray) -> np.ndarray:
    """Weights over the uniform one -> where they lie on a logarithmic scale, from 0 to 1."""
    return (0.5 + np.log(weights) / np.log(HIGH) / 2).clip(0, 1)


@torch.inference_mode()
def weights_of_points(
    network: nn.Module, path: str, height: int, width: int
) -> dict[str, np.ndarray]:
    """Each of POINTS' rows of the attention, (h, w), times HW: 1 where uniform."""
    device = next(network.parameters()).device
    image, _ = ImageDataset([path], [0], height, width)[0]
    sona, x = sona_input(network, normalize(image[None].to(device)))
    rows, columns = x.shape[2:]
    weights = rows * columns * sona.attention(x)[0].cpu().numpy()  # (HW, HW)
    points = {}
    for name, (top, left) in POINTS.items():
        point = int(top * rows) * columns + int(left * columns)
        points[name] = weights[point].reshape(rows, columns)
    return points


def panel(photo: Image.Image, shares: np.ndarray, point: tuple[float, float]) -> Image.Image:
    """A heat map (h, w) from 0 to 1 over a photo in grey, with the point's position framed."""
    rows, columns = shares.shape
    heat = Image.fromarray(colour(shares)).resize(photo.size, Image.Resampling.NEAREST)
    image = Image.blend(photo.convert("L").convert("RGB"), heat, 0.65)
    width = photo.width / columns
    height = photo.height / rows
    left = int(point[1] * columns) * width
    top = int(point[0] * rows) * height
    frame = (left, top, left + width - 1, top + height - 1)
    ImageDraw.Draw(image).rectangle(frame, outline="#20e040", width=3)
    return image


def colour(shares: np.ndarray) -> np.ndarray:
    """Shares (...) from 0 to 1 -> (..., 3) uint8."""
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(shares, stops, channel) for channel in COLOURS.T]
    return np.stack(channels, -1).astype(np.uint8)


if __name__ == "__main__":
    main()
