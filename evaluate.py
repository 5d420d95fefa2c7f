# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""Evaluate runs of SONA-Net (Xia et al., ICCV 2019): CMC and mAP (Sec. 3.3).

Usage:
    python evaluate.py runs/toy                              # mAP and Rank-1, 5, 10
    python evaluate.py runs/market1501 --dataset dukemtmc    # on a data set other than the run's
    python evaluate.py runs/a runs/b runs/c runs/d           # mean and standard deviation of runs
    python evaluate.py runs/toy --ranking ranking.png        # queries with their nearest images
    python evaluate.py runs/toy --attention attention.png    # Fig. 3
    python evaluate.py runs/toy --query a.jpg b.jpg --gallery photos/    # your own photos
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import (
    DATASETS,
    EXTENSIONS,
    DataError,
    ImageDataset,
    Split,
    describe,
    load_dataset,
    normalize,
    read_image,
)
from losses import gather
from model import SONA, SONANet


class Ranking(NamedTuple):
    """Metrics of a ranking, as fractions."""

    cmc: (
        np.ndarray
    )  # (max_rank,): cmc[k - 1] is the share of queries with a match among the first k
    mean_ap: float
    average_precisions: np.ndarray  # (queries,), nan if left out

    def metrics(self) -> dict[str, float]:
        """The four metrics of the paper's tables. Raises ValueError if max_rank was below 10."""
        if len(self.cmc) < 10:
            raise ValueError(f"Rank-10 needs a max_rank of 10 or more, not {len(self.cmc)}")
        return {"mean_ap": self.mean_ap} | {f"rank{k}": float(self.cmc[k - 1]) for k in (1, 5, 10)}


def evaluate_ranking(
    query_features: np.ndarray,
    gallery_features: np.ndarray,
    query_ids: np.ndarray,
    gallery_ids: np.ndarray,
    query_cams: np.ndarray,
    gallery_cams: np.ndarray,
    max_rank: int = 50,
) -> Ranking:
    """CMC and average precision of single queries, by the Market-1501 protocol (Zheng et al. 2015).

        ranking = evaluate_ranking(features, gallery_features, ids, gallery_ids, cams, gallery_cams)
        print(f"mAP {ranking.mean_ap:.2%}, Rank-1 {ranking.cmc[0]:.2%}")

    features (N, D), ids and cams (N,): arrays, lists or tensors. For each query, gallery images of
    its own identity from its own camera do not count, nor does junk (identity -1, Sec. 3.1). Not in
    the paper: distances are Euclidean, between raw features in their own precision (at least
    float32); equal distances rank in gallery order; AP is the mean of the precisions at each true
    match; queries without a true match from another camera are left out of the mean.

    Raises ValueError if shapes do not match, features are not finite or no query has a true match.
    """
    queries = np.asarray(query_features)
    gallery = np.asarray(gallery_features)
    dtype = np.result_type(queries.dtype, gallery.dtype, np.float32)
    queries = queries.astype(dtype)
    gallery = gallery.astype(dtype)
    query_ids, query_cams, gallery_ids, gallery_cams = map(
        np.asarray, (query_ids, query_cams, gallery_ids, gallery_cams)
    )
    shapes = [x.shape for x in (query_ids, query_cams, gallery_ids, gallery_cams)]
    lengths = len(queries), len(gallery)
    if shapes != [(lengths[0],), (lengths[0],), (lengths[1],), (lengths[1],)]:
        raise ValueError(f"ids and cams of shapes {shapes} for {lengths} features")
    half_norms = np.einsum("nd,nd->n", gallery, gallery) / 2
    if not np.isfinite(queries.sum() + half_norms.sum()):
        raise ValueError("the features hold nan, inf or numbers too large to square")
    half_norms[gallery_ids == -1] = np.inf  # junk comes last, behind every match

    average_precisions = np.full(len(queries), np.nan)
    hits = np.zeros(max_rank)
    slab = max(1, 2**23 // len(gallery))  # queries at a time: 32 MB of scores in float32
    for start in range(0, len(queries), slab):
        # |q - g|^2 / 2 less |q|^2 / 2, which is the same for all g, ranks as the distance does.
        scores = half_norms - queries[start : start + slab] @ gallery.T  # (slab, gallery)
        for q, row in enumerate(scores, start):
            same_id = np.flatnonzero(gallery_ids == query_ids[q])
            same_cam = gallery_cams[same_id] == query_cams[q]
            row[same_id[same_cam]] = np.inf
            matches = same_id[~same_cam]
            if len(matches) == 0 or query_ids[q] == -1:
                continue
            # A match's rank, from 0: how many are nearer, or as near and earlier in the gallery.
            ranks = [
                np.count_nonzero(row[:i] <= row[i]) + np.count_nonzero(row[i:] < row[i])
                for i in matches
            ]
            ranks = np.sort(ranks)
            average_precisions[q] = np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1))
            hits[ranks[0] :] += 1

    counted = np.count_nonzero(~np.isnan(average_precisions))
    if counted == 0:
        raise ValueError("no query has a true match from another camera")
    return Ranking(hits / counted, float(np.nanmean(average_precisions)), average_precisions)


def summary(metrics: dict[str, float]) -> str:
    """The four metrics in the paper's form, in per cent."""
    names = {"mean_ap": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
    return "  ".join(f"{name}{100 * metrics[key]:7.2f}" for key, name in names.items())


# ---------- Features and runs ---------------------------------------------------------------------

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision(device: torch.device) -> str:
    """fp16 on GPUs of compute capability 7.0 or more, float32 elsewhere. Not in the paper."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return "fp16"
    return "float32"


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """The layout of a network in which its convolutions are fastest; their outputs follow it.

    channels_last, except in float32 on GPUs without tensor cores for it (before 8.0).
    """
    if device.type == "cuda" and precision == "float32":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return torch.contiguous_format
    return torch.channels_last


@torch.inference_mode()
def extract_features(
    network: nn.Module, paths: Sequence[str], height: int, width: int, workers: int = 0
) -> np.ndarray:
    """(N, 1536) test embeddings of images: the mean over an image and its mirror image (Sec. 3.2).

    In float32, computed in the device's default_precision. Under torch.distributed, the processes
    share the images, all use the first one's batch-norm statistics, and each returns all features.
    Leaves the network in eval mode.
    """
    device = next(network.parameters()).device
    dtype = PRECISIONS[default_precision(device)]
    rank = 0
    processes = 1
    if dist.is_initialized():
        rank = dist.get_rank()
        processes = dist.get_world_size()
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    share = math.ceil(len(paths) / processes)  # the last processes are padded with the first images
    own = [paths[i % len(paths)] for i in range(rank * share, (rank + 1) * share)]
    dataset = ImageDataset(own, range(share), height, width)
    network.eval()
    features = []
    for images, _ in DataLoader(dataset, batch_size=64, num_workers=workers):
        images = normalize(images.to(device))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            embeddings = network(torch.cat([images, images.flip(3)]))  # (2B, 1536)
        features.append(embeddings.float().unflatten(0, (2, -1)).mean(0))
    return gather(torch.cat(features))[: len(paths)].cpu().numpy()


def rank_splits(features: np.ndarray, query: Split, gallery: Split) -> Ranking:
    """The ranking of a gallery for queries. features: first all queries', then the gallery's."""
    query_features, gallery_features = np.split(features, [len(query.paths)])
    return evaluate_ranking(
        query_features, gallery_features, query.ids, gallery.ids, query.cams, gallery.cams
    )


def evaluate(
    network: nn.Module, query: Split, gallery: Split, height: int, width: int, workers: int = 0
) -> Ranking:
    """The ranking of a network's features (Sec. 3.3)."""
    paths = [*query.paths, *gallery.paths]  # together, so that their readers start only once
    features = extract_features(network, paths, height, width, workers)
    return rank_splits(features, query, gallery)


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[SONANet, dict]:
    """The network in a run's folder, in eval mode, and the settings of its training."""
    device = torch.device(device)
    checkpoint = torch.load(Path(run, "last.pt"), map_location="cpu", weights_only=True)
    settings = checkpoint["settings"]
    trained = len(checkpoint["history"])
    if trained < settings["epochs"]:
        print(f"note: {run} has trained for {trained} of {settings['epochs']} epochs")
    num_classes = len(checkpoint["network"]["global_classifier.bias"])
    network = SONANet(num_classes, settings["sona"], settings["drop"])
    network.load_state_dict(checkpoint["network"])
    network.to(device, memory_format=memory_format(device, default_precision(device)))
    return network.eval(), settings


# ---------- Command line --------------------------------------------------------------------------


def main() -> None:
    args = parse_args()
    if args.curves:
        draw_curves(args.runs).save(args.curves)
        return

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = [load_run(run, device) for run in args.runs]
    network, settings = runs[-1]
    size = settings["height"], settings["width"]
    if args.query:
        query_paths = photos(args.query)
    else:
        name = args.dataset or settings["dataset"]
        splits = load_dataset(name, args.data_dir or settings["data_dir"])
        query = splits["query"]
        gallery = splits["gallery"]
        query_paths = query.paths

    if args.attention:
        draw_attention(network, query_paths[:6], *size).save(args.attention)
        return

    # your own photos
    if args.query:
        gallery_paths = photos(Path(args.gallery).rglob("[!.]*"))
        features = extract_features(network, query_paths + gallery_paths, *size, args.workers)
        query_features, gallery_features = np.split(features, [len(query_paths)])
        rows = []
        for path, feature in zip(query_paths, query_features, strict=True):
            print(path)
            found = nearest(feature, gallery_features)
            for i, distance in found:
                print(f"{distance:10.3f}  {gallery_paths[i]}")
            tiles = [tile(gallery_paths[i], "white", f"{d:.2f}") for i, d in found[:5]]
            rows.append([tile(path, BLUE, ""), *tiles])
        if args.ranking:
            title = "Queries (blue) and their nearest images, with distances"
            draw_rows(rows, title).save(args.ranking)
        return

    # a data set
    print(describe(name, splits) + "\n")
    table = []
    for run, (network, settings) in zip(args.runs, runs, strict=True):
        paths = [*query.paths, *gallery.paths]
        size = settings["height"], settings["width"]
        features = extract_features(network, paths, *size, args.workers)
        ranking = rank_splits(features, query, gallery)
        table.append(ranking.metrics())
        print(f"{run:<22}  {summary(table[-1])}")
    if len(runs) > 1:
        values = [list(metrics.values()) for metrics in table]
        mean = dict(zip(table[0], np.mean(values, 0), strict=True))
        # Not in the paper: the population's deviation, as the paper's seem to be.
        deviation = dict(zip(table[0], np.std(values, 0), strict=True))
        print(f"{'mean':<22}  {summary(mean)}")
        print(f"{'standard deviation':<22}  {summary(deviation)}")
    if args.ranking:
        draw_ranking(query, gallery, features, ranking).save(args.ranking)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Evaluate trained runs: mAP and CMC with single queries."
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run; of several, the mean and standard deviation are printed, too",
    )
    add("--dataset", choices=DATASETS, help="data set to evaluate on [the last RUN's]")
    add("--data-dir", help="folder that holds the data sets [as in training]")
    add("--workers", type=int, default=2, help="data-loader processes [%(default)s]")
    add(
        "--ranking",
        metavar="PNG",
        help="also draw queries and their nearest images, for the last RUN",
    )
    add(
        "--attention",
        metavar="PNG",
        help="draw the last RUN's attention, as in Fig. 3, and nothing else",
    )
    add("--curves", metavar="PNG", help="plot the runs' losses and mAP, and nothing else")
    add(
        "--query",
        nargs="+",
        metavar="IMAGE",
        help="your own query photos, each cropped to one person",
    )
    add("--gallery", metavar="FOLDER", help="folder to search, with its subfolders")
    args = parser.parse_args()
    if bool(args.query) != bool(args.gallery) and not args.attention:
        parser.error("--query and --gallery go together")
    return args


def photos(paths: Sequence[str | Path]) -> list[str]:
    """The images among paths."""
    paths = sorted(str(path) for path in paths if str(path).lower().endswith(EXTENSIONS))
    if not paths:
        raise DataError(f"no images ({', '.join(EXTENSIONS)}) in --query or --gallery")
    return paths


def nearest(
    query: np.ndarray, gallery: np.ndarray, skip: np.ndarray | None = None
) -> list[tuple[int, float]]:
    """The indices and distances of the ten features nearest to one, from the nearest on.

    query (D,), gallery (N, D); skip (N,) bool, which to pass over.
    """
    distances = np.linalg.norm(gallery - query, axis=1)
    order = np.argsort(distances, kind="stable")
    if skip is not None:
        order = order[~skip[order]]
    return [(int(i), float(distances[i])) for i in order[:10]]


# ---------- Pictures ------------------------------------------------------------------------------

TILE = (112, 224)  # width and height of an image in a picture
BLUE = "#3060c0"
GREEN = "#20a040"
RED = "#d03030"


class Tile(NamedTuple):
    """An image in a picture, with the colour of its frame and a caption of two lines."""

    image: Image.Image
    frame: str
    caption: str


def tile(path: str, frame: str, caption: str) -> Tile:
    """The tile of an image file. Raises DataError."""
    return Tile(TF.to_pil_image(read_image(path)).resize(TILE), frame, caption)


def draw_rows(rows: list[list[Tile]], title: str) -> Image.Image:
    """Rows of tiles, each a framed image with its caption below."""
    width = TILE[0] + 14
    height = TILE[1] + 52
    picture = Image.new("RGB", (width * max(map(len, rows)) + 4, height * len(rows) + 32), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((9, 8), title, "black", font_size=14)
    for i, row in enumerate(rows):
        for j, (image, frame, caption) in enumerate(row):
            left = 4 + j * width
            top = 32 + i * height
            picture.paste(ImageOps.expand(image, 5, frame), (left, top))
            draw.multiline_text((left + 5, top + TILE[1] + 11), caption, "black", font_size=15)
    return picture


def draw_ranking(
    query: Split, gallery: Split, features: np.ndarray, ranking: Ranking
) -> Image.Image:
    """A row for each of ten queries, from the highest AP down, with its five nearest images.

    features are those of all queries, then the gallery's.
    """
    query_features, gallery_features = np.split(features, [len(query.paths)])
    order = np.argsort(-ranking.average_precisions)  # nan comes last
    ranked = np.count_nonzero(~np.isnan(ranking.average_precisions))
    chosen = order[np.unique(np.linspace(0, ranked - 1, 10).astype(int))]
    rows = []
    for q in chosen:
        caption = f"camera {query.cams[q]}\nAP {100 * ranking.average_precisions[q]:.1f} %"
        row = [tile(query.paths[q], BLUE, caption)]
        same_id = gallery.ids == query.ids[q]
        same_cam = gallery.cams == query.cams[q]
        for i, distance in nearest(query_features[q], gallery_features, same_id & same_cam)[:5]:
            frame = GREEN if same_id[i] else RED
            row.append(tile(gallery.paths[i], frame, f"camera {gallery.cams[i]}\n{distance:.2f}"))
        rows.append(row)
    title = (
        "Queries (blue) and their nearest images, with distances. Green: same person; red: another"
    )
    return draw_rows(rows, title)


@torch.no_grad()
def sona_input(network: nn.Module, images: Tensor) -> tuple[SONA, Tensor]:
    """The network's first SONA module and its input (B, C, h, w), for normalised images."""
    sona = next((module for module in network.modules() if isinstance(module, SONA)), None)
    assert sona, "the network has no SONA module to draw"
    inputs = []
    hook = sona.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    network(images)
    hook.remove()
    return sona, inputs[0]


# Reference points like those of Fig. 3, as shares of height and width.
POINTS = {
    "head": (0.1, 0.5),
    "torso": (0.33, 0.5),
    "legs": (0.7, 0.45),
    "shoes": (0.93, 0.45),
    "background": (0.2, 0.08),
}


@torch.inference_mode()
def draw_attention(
    network: nn.Module, paths: Sequence[str], height: int, width: int
) -> Image.Image:
    """Fig. 3, in eval mode, of the first SONA module: a row per image, a column per point."""
    device = next(network.parameters()).device
    tiles = []
    for path, (image, _) in zip(paths, ImageDataset(paths, paths, height, width), strict=True):
        sona, x = sona_input(network, normalize(image[None].to(device)))
        rows, columns = x.shape[2:]
        weights = rows * columns * sona.attention(x)[0].cpu()  # (HW, HW), 1 where uniform
        plain = tile(path, "white", "")
        tiles.append([plain])
        for name, (top, left) in POINTS.items():
            point = int(top * rows) * columns + int(left * columns)
            strongest = weights[point].topk(min(10, rows * columns)).indices.tolist()
            marked = plain.image.copy()
            for position in (*strongest, point):
                x = (position % columns + 0.5) / columns * TILE[0]
                y = (position // columns + 0.5) / rows * TILE[1]
                colour = "#20e040" if position == point else "#ff2020"
                ImageDraw.Draw(marked).ellipse((x - 4, y - 4, x + 4, y + 4), colour, "black")
            excess = 100 * (weights[point].max().item() - 1)
            tiles[-1].append(Tile(marked, "white", f"{name}\n{excess:+.2g} %"))
    return draw_rows(
        tiles, "Green: a point; red: the ten it attends to most, the strongest over uniform in %"
    )


CURVE_COLOURS = [BLUE, "#d07020", GREEN, "#a03090", "#808080", "#b0a000", "#008080", RED]


def draw_curves(runs: list[str]) -> Image.Image:
    """Losses and mAP of runs over their epochs; prints their average losses (Sec. 3.4)."""
    logs = []
    for run in runs:
        with open(Path(run, "log.jsonl")) as file:
            logs.append([json.loads(line) for line in file])
    epochs = min(map(len, logs))
    averages = [np.mean([record["loss"] for record in log[:epochs]]) for log in logs]
    print(f"average loss of {epochs} epochs, and its difference from the first run's")
    for run, average in zip(runs, averages, strict=True):
        print(f"{average:9.4f} {average / averages[0] - 1:+8.2%}  {run}")

    picture = Image.new("RGB", (840, 330 + 20 * len(runs)), "white")
    draw = ImageDraw.Draw(picture)
    for i, run in enumerate(runs):
        draw.text((60, 320 + 20 * i), run, CURVE_COLOURS[i % len(CURVE_COLOURS)], font_size=14)
    losses = [[(record["epoch"] + 1, record["loss"]) for record in log] for log in logs]
    mean_aps = [
        [(record["epoch"] + 1, 100 * record["mean_ap"]) for record in log if "mean_ap" in record]
        for log in logs
    ]
    draw_chart(draw, 60, "loss", losses)
    draw_chart(draw, 480, "mAP in %", mean_aps)
    return picture


def ticks(high: float, least: float = 0) -> np.ndarray:
    """Round numbers from 0 to high: at most six, at least `least` apart."""
    power = 10.0 ** math.floor(math.log10(high / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if 5 * power * factor >= high)
    return np.arange(0, high * 1.001, max(step, least))


def draw_chart(
    draw: ImageDraw.ImageDraw, left: int, title: str, curves: list[list[tuple[float, float]]]
) -> None:
    """Curves of (epoch, y) points, one of CURVE_COLOURS each, in 340 x 240 pixels."""
    last, high = np.max([(1, 1e-9), *sum(curves, [])], 0)  # both axes begin at 0

    def at(epoch: float, y: float) -> tuple[float, float]:
        return left + 340 * epoch / last, 270 - 240 * y / high

    draw.text((left, 8), title, "black", font_size=14)
    draw.text((left + 170, 294), "epoch", "black", font_size=12, anchor="mt")
    for y in ticks(high):
        draw.line((at(0, y), at(last, y)), "#d0d0d0")
        draw.text((left - 6, at(0, y)[1]), f"{y:.3g}", "black", font_size=12, anchor="rm")
    for epoch in ticks(last, 1):
        draw.text((at(epoch, 0)[0], 276), f"{epoch:.0f}", "black", font_size=12, anchor="mt")
    for curve, colour in zip(curves, CURVE_COLOURS * len(curves), strict=False):
        draw.line([at(*point) for point in curve], colour, width=2)
        for x, y in [at(*point) for point in curve[-1:]]:  # a dot, so that a single point shows
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
