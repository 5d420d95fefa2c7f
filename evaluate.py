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
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import DATASETS, EXTENSIONS, DataError, ImageDataset, Split, describe, load_dataset, normalize, read_image
from losses import gather
from model import SONA, SONANet


class Ranking(NamedTuple):
    """How well queries find their identity, as fractions."""

    cmc: np.ndarray  # (max_rank,): at k - 1 the share of queries with a match among the first k
    mean_ap: float
    average_precisions: np.ndarray  # (queries,), nan if left out

    def figures(self) -> dict[str, float]:
        """The four figures of the paper's tables, as fractions; max_rank must be 10 or more."""
        return {"mean_ap": self.mean_ap} | {f"rank{k}": float(self.cmc[k - 1]) for k in (1, 5, 10)}


def evaluate_ranking(
    query_features: np.ndarray, gallery_features: np.ndarray,
    query_ids: np.ndarray, gallery_ids: np.ndarray,
    query_cams: np.ndarray, gallery_cams: np.ndarray, max_rank: int = 50,
) -> Ranking:
    """CMC and average precision of single queries, by the Market-1501 protocol (Zheng et al. 2015).

    features (N, D), ids and cams (N,). For each query, gallery images of its own identity from its
    own camera do not count, nor does junk (identity -1, Sec. 3.1). Not in the paper: distances are
    Euclidean, on raw features, in their precision, at least float32; equal ones, as computed,
    in gallery order; AP is the mean of the precisions at each true match; queries without a true match
    from another camera are left out of the mean.

    Raises ValueError if lengths do not match, features are not finite, or no query has a true match.
    """
    dtype = np.result_type(query_features, gallery_features, np.float32)
    queries, gallery = np.asarray(query_features, dtype), np.asarray(gallery_features, dtype)
    labels = query_ids, query_cams, gallery_ids, gallery_cams
    query_ids, query_cams, gallery_ids, gallery_cams = map(np.asarray, labels)
    if [*map(len, labels)] != [len(queries), len(queries), len(gallery), len(gallery)]:
        raise ValueError(f"lengths differ: features {len(queries)}, {len(gallery)}; labels {[*map(len, labels)]}")
    half_norms = np.einsum("nd,nd->n", gallery, gallery) / 2
    if not np.isfinite(queries.sum() + half_norms.sum()):
        raise ValueError("the features hold nan, inf or numbers too large to square")
    half_norms[gallery_ids == -1] = np.inf  # junk comes last, behind every match

    average_precisions, hits = np.full(len(queries), np.nan), np.zeros(max_rank)
    slab = max(1, 2**23 // len(gallery))  # queries at a time: 32 MB of distances in float32
    for start in range(0, len(queries), slab):
        # |q - g|^2 / 2 less |q|^2 / 2, the same for all g: one product, exact enough near the origin.
        distances = half_norms - queries[start : start + slab] @ gallery.T  # (slab, gallery)
        for query, row in enumerate(distances, start):
            same_id = np.flatnonzero(gallery_ids == query_ids[query])
            same_cam = gallery_cams[same_id] == query_cams[query]
            row[same_id[same_cam]] = np.inf
            matches = same_id[~same_cam]
            if len(matches) == 0 or query_ids[query] == -1:
                continue
            # A match's rank, from 0: how many are nearer, or as near and earlier in the gallery.
            ranks = [np.count_nonzero(row[:i] <= row[i]) + np.count_nonzero(row[i:] < row[i]) for i in matches]
            ranks = np.sort(ranks)
            average_precisions[query] = np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1))
            hits[ranks[0] :] += 1

    counted = np.count_nonzero(~np.isnan(average_precisions))
    if counted == 0:
        raise ValueError("no query has a true match from another camera")
    return Ranking(hits / counted, float(np.nanmean(average_precisions)), average_precisions)


def summary(figures: dict[str, float]) -> str:
    """The four figures in the paper's form, in per cent."""
    names = {"mean_ap": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
    return "  ".join(f"{name}{100 * figures[key]:7.2f}" for key, name in names.items())


# ---------- Features and runs ---------------------------------------------------------------------


@torch.inference_mode()
def extract_features(
    network: nn.Module, paths: list[str], height: int, width: int, workers: int = 0
) -> np.ndarray:
    """(N, 1536) test embeddings of images: the mean over an image and its mirror image (Sec. 3.2).

    Under torch.distributed the processes share the images, and each returns all features, with
    the first one's batch-norm statistics. Leaves the network in eval mode.
    """
    device, rank, processes = next(network.parameters()).device, 0, 1
    if dist.is_initialized():
        rank, processes = dist.get_rank(), dist.get_world_size()
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    each = math.ceil(len(paths) / processes)  # the last ones fill theirs up from the first image on
    own = [paths[i % len(paths)] for i in range(rank * each, (rank + 1) * each)]
    network.eval()
    features = []
    for batch, _ in DataLoader(ImageDataset(own, height, width), 64, num_workers=workers):
        batch = normalize(batch.to(device))
        both = network(torch.cat([batch, batch.flip(3)]))  # (2B, 1536)
        features.append(both.unflatten(0, (2, -1)).mean(0))
    return gather(torch.cat(features))[: len(paths)].cpu().numpy()


def evaluate(
    network: nn.Module, query: Split, gallery: Split, height: int, width: int, workers: int = 0
) -> tuple[list[np.ndarray], Ranking]:
    """The features of query and gallery, and the ranking."""
    features = [extract_features(network, x.paths, height, width, workers) for x in (query, gallery)]
    return features, evaluate_ranking(*features, query.ids, gallery.ids, query.cams, gallery.cams)


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[SONANet, dict]:
    """The network in a run's folder, in eval mode, and the settings of its training."""
    state = torch.load(Path(run, "last.pt"), map_location="cpu", weights_only=True)
    settings = state["settings"]
    if len(state["history"]) < settings["epochs"]:
        print(f"note: {run} has trained for {len(state['history'])} of {settings['epochs']} epochs")
    network = SONANet(len(state["network"]["global_classifier.bias"]), settings["sona"], settings["drop"])
    network.load_state_dict(state["network"])
    return network.to(device, memory_format=torch.channels_last).eval(), settings


# ---------- Command line --------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate trained runs: mAP and CMC of single queries.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder; several give mean and deviation, too")
    add("--dataset", choices=DATASETS, help="evaluate on a set other than the last RUN's")
    add("--data-dir", help="folder of the data sets [as in the run's training]")
    add("--workers", type=int, default=2, help="processes that read images [%(default)s]")
    add("--ranking", metavar="PNG", help="draw queries and their nearest images for the last RUN")
    add("--attention", metavar="PNG", help="only draw the last RUN's attention, as in Fig. 3")
    add("--curves", metavar="PNG", help="only plot losses and mAP of the runs")
    add("--query", nargs="+", metavar="IMAGE", help="search for your photos, crops of one person each")
    add("--gallery", metavar="FOLDER", help="where to search, including subfolders")
    args = parser.parse_args()
    if bool(args.query) != bool(args.gallery) and not args.attention:
        parser.error("--query and --gallery go together")
    return args


def main() -> None:
    args = parse_args()
    if args.curves:
        return draw_curves(args.runs).save(args.curves)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = {run: load_run(run, device) for run in args.runs}
    network, settings = runs[args.runs[-1]]
    size, ranking = (settings["height"], settings["width"]), None
    if args.query:
        files = Path(args.gallery).rglob("[!.]*") if args.gallery else args.query
        query, gallery = photos(args.query, 0), photos(files, 1)
    else:
        name = args.dataset or settings["dataset"]
        splits = load_dataset(name, args.data_dir or settings["data_dir"])
        query, gallery = splits["query"], splits["gallery"]
    if args.attention:
        return draw_attention(network, query.paths[:6], *size).save(args.attention)

    if args.query:
        features = [extract_features(network, x.paths, *size, args.workers) for x in (query, gallery)]
        for i, path in enumerate(query.paths):
            print(path)
            for j, distance in nearest(i, query, gallery, features):
                print(f"{distance:10.3f}  {gallery.paths[j]}")
    else:
        print(describe(name, splits) + "\n")
        figures = []
        for run, (network, settings) in runs.items():
            size = settings["height"], settings["width"]
            features, ranking = evaluate(network, query, gallery, *size, args.workers)
            figures.append(list(ranking.figures().values()))
            print(f"{run:<22}  {summary(ranking.figures())}")
        if len(runs) > 1:  # not in the paper: the population's deviation, as the paper's seem to be
            for title, of in (("mean", np.mean), ("standard deviation", np.std)):
                print(f"{title:<22}  {summary(dict(zip(ranking.figures(), of(figures, 0), strict=True)))}")
    if args.ranking:
        draw_ranking(query, gallery, features, ranking).save(args.ranking)


def photos(paths: Iterable[str | Path], camera: int) -> Split:
    """The images among paths, unlabelled, from one camera."""
    paths = sorted(str(path) for path in paths if str(path).lower().endswith(EXTENSIONS))
    if not paths:
        raise DataError(f"no images ({', '.join(EXTENSIONS)}) in --query or --gallery")
    return Split(paths, np.full(len(paths), -1), np.full(len(paths), camera))


# ---------- Pictures ------------------------------------------------------------------------------

TILE = (112, 224)  # width and height of an image in a picture


def tile(path: str, frame: str, words: str) -> tuple[Image.Image, str, str]:
    """An image, its frame, the end of its name and words. Raises DataError."""
    return TF.to_pil_image(read_image(path)).resize(TILE), frame, f"{Path(path).stem[-18:]}\n{words}"


def draw_rows(rows: list[list[tuple[Image.Image, str, str]]], title: str) -> Image.Image:
    """Rows of tiles, each a framed image with its words below."""
    width, height = TILE[0] + 14, TILE[1] + 48
    picture = Image.new("RGB", (width * max(map(len, rows)) + 4, height * len(rows) + 32), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((9, 8), title, "black", font_size=14)
    for i, row in enumerate(rows):
        for j, (image, frame, words) in enumerate(row):
            left, top = 4 + j * width, 32 + i * height
            picture.paste(ImageOps.expand(image, 5, frame), (left, top))
            draw.multiline_text((left + 5, top + TILE[1] + 11), words, "black", font_size=11, spacing=2)
    return picture


def nearest(i: int, query: Split, gallery: Split, features: list[np.ndarray]) -> list[tuple[int, float]]:
    """Query i's ten nearest images and their distances, without those of its identity and camera."""
    distances = np.linalg.norm(features[1] - features[0][i], axis=1)
    other = np.flatnonzero((gallery.ids != query.ids[i]) | (gallery.cams != query.cams[i]))
    return [(j, distances[j]) for j in other[np.argsort(distances[other], kind="stable")[:10]]]


def draw_ranking(
    query: Split, gallery: Split, features: list[np.ndarray], ranking: Ranking | None
) -> Image.Image:
    """A row per query (blue), ten if ranked, with its ten nearest images; no ranking if unlabelled."""
    chosen, title = range(len(query.paths)), "Queries (blue), their nearest images and distances"
    if ranking:
        title += ", from the lowest AP up; green: the same person, red: another"
        order = np.argsort(ranking.average_precisions)  # nan comes last
        last = np.count_nonzero(~np.isnan(ranking.average_precisions)) - 1
        chosen = order[np.unique(np.linspace(0, last, 10).astype(int))]

    rows = []
    for i in chosen:
        words = f"AP {100 * ranking.average_precisions[i]:.1f}" if ranking else ""
        rows.append([tile(query.paths[i], "#3060c0", words)])
        for j, distance in nearest(i, query, gallery, features):
            frame = "#20a040" if gallery.ids[j] == query.ids[i] else "#d03030"
            rows[-1].append(tile(gallery.paths[j], frame if ranking else "white", f"{distance:.2f}"))
    return draw_rows(rows, title)


@torch.no_grad()
def sona_input(network: nn.Module, images: Tensor) -> tuple[SONA, Tensor]:
    """The network's first SONA module, and its input (B, C, h, w) for normalised images (B, 3, H, W)."""
    sona = next((module for module in network.modules() if isinstance(module, SONA)), None)
    assert sona, "the network has no SONA module to draw"
    inputs = []
    hook = sona.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    network(images)
    hook.remove()
    return sona, inputs[0]


# Reference points like those of Fig. 3, as shares of height and width.
POINTS = {"head": (0.1, 0.5), "torso": (0.33, 0.5), "legs": (0.7, 0.45), "shoes": (0.93, 0.45)}
POINTS["background"] = (0.2, 0.08)


@torch.inference_mode()
def draw_attention(network: nn.Module, paths: list[str], height: int, width: int) -> Image.Image:
    """Fig. 3, in eval mode, of the first SONA module: a row per image, a column per point."""
    picture, device = [], next(network.parameters()).device
    for path, (pixels, _) in zip(paths, ImageDataset(paths, height, width), strict=True):
        sona, features = sona_input(network, normalize(pixels[None].to(device)))
        rows, columns = features.shape[2:]
        weights = rows * columns * sona.attention(features)[0].cpu()  # (HW, HW)
        picture.append([tile(path, "white", "")])
        for name, (top, left) in POINTS.items():
            point, image = int(top * rows) * columns + int(left * columns), picture[-1][0][0].copy()
            strongest = weights[point].topk(min(10, rows * columns)).indices.tolist()
            for position in (*strongest, point):
                x = (position % columns + 0.5) / columns * TILE[0]
                y = (position // columns + 0.5) / rows * TILE[1]
                colour = "#20e040" if position == point else "#ff2020"
                ImageDraw.Draw(image).ellipse((x - 4, y - 4, x + 4, y + 4), colour, "black")
            picture[-1].append((image, "white", f"{name}\nup to {weights[point].max():.3f} x"))
    return draw_rows(picture, "Green: a point; red: the ten it attends to most; 1 x: the uniform weight")


COLOURS = ["#3060c0", "#d07020", "#20a040", "#a03090", "#808080", "#b0a000", "#008080", "#c03030"]


def draw_curves(runs: list[str]) -> Image.Image:
    """Losses and mAP of runs over their epochs; prints their average losses (Sec. 3.4)."""
    picture = Image.new("RGB", (840, 310 + 20 * len(runs)), "white")
    draw = ImageDraw.Draw(picture)
    logs = [list(map(json.loads, open(Path(run, "log.jsonl")))) for run in runs]
    epochs = min(map(len, logs))
    averages = [np.mean([record["loss"] for record in log[:epochs]]) for log in logs]
    print(f"average loss of {epochs} epochs, and its difference from the first run's")
    for i, (run, average) in enumerate(zip(runs, averages, strict=True)):
        print(f"{average:9.4f} {average / averages[0] - 1:+8.2%}  {run}")
        draw.text((60, 300 + 20 * i), run, COLOURS[i % len(COLOURS)], font_size=14)
    for left, key in ((60, "loss"), (480, "mean_ap")):
        draw_chart(draw, left, key, [[(r["epoch"], r[key]) for r in log if key in r] for log in logs])
    return picture


def draw_chart(draw: ImageDraw.ImageDraw, left: int, title: str, curves: list[list[tuple]]) -> None:
    """Curves of (epoch, y) points, one of COLOURS each, in 340 x 240 pixels."""
    last, high = np.max(sum(curves, [(1, 1e-9)]), 0)  # both axes begin at 0

    def at(epoch: float, y: float) -> tuple[float, float]:
        return left + 340 * epoch / last, 270 - 240 * y / high

    draw.text((left, 8), title, "black", font_size=14)
    for y in np.linspace(0, high, 5):
        draw.line((at(0, y), at(last, y)), "#d0d0d0")
        draw.text((left - 6, at(0, y)[1]), f"{y:.3g}", "black", font_size=12, anchor="rm")
    for epoch in np.unique(np.linspace(0, last, 5).round().astype(int)):
        draw.text((at(epoch, 0)[0], 276), str(epoch), "black", font_size=12, anchor="mt")
    for curve, colour in zip(curves, COLOURS * len(curves), strict=False):
        draw.line([at(*point) for point in curve], colour, width=2)
        for x, y in [at(*point) for point in curve[-1:]]:  # seen even if it is the only one
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"error: {error}")
