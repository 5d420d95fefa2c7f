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
import os
import sys
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader

from data import (
    DATASETS,
    EXTENSIONS,
    DataError,
    ImageDataset,
    Split,
    describe,
    load_dataset,
    load_tensors,
    normalize,
    read_image,
    run_program,
)
from losses import gather
from model import SONA, SONANet


class Ranking(NamedTuple):
    """Metrics of a ranking, as fractions."""

    cmc: np.ndarray  # (max_rank,): [k - 1] is the share of queries with a match in the first k
    mean_ap: float
    average_precisions: np.ndarray  # (queries,), nan if left out

    def metrics(self):
        """The four metrics of the paper's tables. Raises IndexError if max_rank was below 10."""
        return {"mean_ap": self.mean_ap} | {f"rank{k}": float(self.cmc[k - 1]) for k in (1, 5, 10)}


def evaluate_ranking(
    query_features, gallery_features, query_ids, gallery_ids, query_cams, gallery_cams, max_rank=50
):
    """CMC and average precision of single queries, by the Market-1501 protocol (Zheng et al. 2015).

        ranking = evaluate_ranking(features, gallery_features, ids, gallery_ids, cams, gallery_cams)
        print(f"mAP {ranking.mean_ap:.2%}, Rank-1 {ranking.cmc[0]:.2%}")

    features (N, D), ids and cams (N,): arrays, lists or tensors. For each query, gallery images of
    its own identity from its own camera do not count, nor does junk (identity -1, Sec. 3.1). Not in
    the paper: distances are Euclidean, between raw features in their own precision (at least
    float32); equal distances rank in gallery order; AP is the mean of the precisions at each true
    match; queries without a true match from another camera are left out of the mean.

    To copy it, take Ranking, `import numpy as np` and `from typing import NamedTuple`, too.

    Raises ValueError if shapes do not match, ids or cams are not integers, features are not finite,
    or no query has a true match.
    """
    queries = np.asarray(query_features)
    gallery = np.asarray(gallery_features)
    labels = [np.asarray(x) for x in (query_ids, query_cams, gallery_ids, gallery_cams)]
    shapes = [x.shape for x in (queries, gallery, *labels)]
    num_q, num_g = len(queries), len(gallery)
    expected = [(num_g, *shapes[0][1:]), (num_q,), (num_q,), (num_g,), (num_g,)]
    if shapes[1:] != expected or 0 in (num_q, num_g):
        raise ValueError(f"queries and gallery, then their ids and cams, have the shapes {shapes}")
    if not all(np.can_cast(x.dtype, np.int64) for x in labels):
        raise ValueError("ids and cams must be integers of at most 64 bits")
    query_ids, query_cams, gallery_ids, gallery_cams = labels
    # Moved to the gallery's middle, because |g|^2 / 2 - qg loses precision far from the origin. It
    # is a median, of at most 100 images, which leaves whole numbers whole or half, so that equal
    # distances stay equal.
    dtype = np.result_type(queries.dtype, gallery.dtype, np.float32)
    middle = np.median(gallery[:: num_g // 100 + 1], 0).astype(dtype)
    queries = queries - middle
    gallery = gallery - middle
    half_norms = np.einsum("nd,nd->n", gallery, gallery) / 2
    if not np.isfinite(queries.sum() + half_norms.sum()):
        raise ValueError("the features hold nan, inf or numbers too large to square")
    half_norms[gallery_ids == -1] = np.inf  # junk comes last, behind every match

    average_precisions = np.full(num_q, np.nan)
    hits = np.zeros(max_rank)
    slab = max(1, 2**23 // num_g)  # queries at a time: 32 MB of scores in float32
    for start in range(0, num_q, slab):
        # |q - g|^2 / 2 less |q|^2 / 2, which is the same for all g, ranks as the distance does.
        scores = half_norms - queries[start : start + slab] @ gallery.T  # (slab, gallery)
        for i, row in enumerate(scores, start):
            same_id = np.flatnonzero(gallery_ids == query_ids[i])
            same_cam = gallery_cams[same_id] == query_cams[i]
            row[same_id[same_cam]] = np.inf
            matches = same_id[~same_cam]
            if len(matches) == 0 or query_ids[i] == -1:
                continue
            # A match's rank, from 0: how many are nearer, or as near and earlier in the gallery.
            before = [np.count_nonzero(row[:match] <= row[match]) for match in matches]
            behind = [np.count_nonzero(row[match:] < row[match]) for match in matches]
            ranks = np.sort(np.add(before, behind))
            average_precisions[i] = np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1))
            hits[ranks[0] :] += 1

    counted = np.count_nonzero(~np.isnan(average_precisions))
    if counted == 0:
        raise ValueError("no query has a true match from another camera")
    return Ranking(hits / counted, float(np.nanmean(average_precisions)), average_precisions)


def summary(metrics):
    """The four metrics in the paper's form, in per cent."""
    names = {"mean_ap": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
    return "  ".join(f"{name}{100 * metrics[key]:7.2f}" for key, name in names.items())


# ---------- Features and runs ---------------------------------------------------------------------

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision(device):
    """fp16 on GPUs of compute capability 7.0 or more, float32 elsewhere. Not in the paper."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0):
        return "fp16"
    return "float32"


def memory_format(device, precision):
    """The layout of a network in which its convolutions should be fastest; outputs follow it.

    channels_last, except in float32 on GPUs without tensor cores for it (before 8.0).
    """
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.contiguous_format if old and precision == "float32" else torch.channels_last


@torch.inference_mode()
def extract_features(network, paths, height, width, workers=0):
    """(N, 1536) test embeddings of images: the mean over an image and its mirror image (Sec. 3.2).

    height and width are in pixels; returns a float32 array, computed in the device's
    default_precision. Under torch.distributed, the processes share the images, all use the first
    one's batch-norm statistics, and each returns all features. Leaves the network in eval mode.
    """
    device = next(network.parameters()).device
    dtype = PRECISIONS[default_precision(device)]
    rank = 0
    share = len(paths)
    if dist.is_initialized():
        rank = dist.get_rank()
        # The last processes are padded with the first images.
        share = math.ceil(share / dist.get_world_size())
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    own = [paths[i % len(paths)] for i in range(rank * share, (rank + 1) * share)]
    # no labels are needed
    loader = DataLoader(ImageDataset(own, own, height, width), 64, num_workers=workers)
    network.eval()
    features = []
    for images, _ in loader:
        progress(f"image {64 * len(features)} of {share}")
        images = normalize(images.to(device))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            embeddings = network(torch.cat([images, images.flip(3)]))  # (2B, 1536)
        features.append(embeddings.float().unflatten(0, (2, -1)).mean(0))
    progress("")  # clears the line
    return gather(torch.cat(features))[: len(paths)].cpu().numpy()


def evaluate(network, query, gallery, height, width, workers=0):
    """The Ranking of a gallery for its queries, both Splits, by a network's embeddings (Sec. 3.3).

    Arguments and errors are those of extract_features and evaluate_ranking.
    """
    paths = query.paths + gallery.paths  # together, so that workers start only once
    features = extract_features(network, paths, height, width, workers)
    query_features, gallery_features = np.split(features, [len(query.paths)])
    return evaluate_ranking(
        query_features, gallery_features, query.ids, gallery.ids, query.cams, gallery.cams
    )


def progress(text):
    """Shows text on a terminal until the next line is printed."""
    if sys.stdout.isatty():
        print(f"  {text:<30}", end="\r", flush=True)


def load_run(run, device="cpu"):
    """The network in a run's folder, in eval mode, and the settings of its training.

    Raises OSError or DataError if there is no checkpoint or it cannot be read.
    """
    device = torch.device(device)
    checkpoint = load_tensors(Path(run, "last.pt"), "network", "history", "settings")
    settings = checkpoint["settings"]
    epochs = len(checkpoint["history"])
    if epochs < settings["epochs"]:
        print(f"note: {run} has trained for {epochs} of {settings['epochs']} epochs")
    num_classes = len(checkpoint["network"]["global_classifier.bias"])
    network = SONANet(num_classes, settings["sona"], settings["drop"])
    network.load_state_dict(checkpoint["network"])
    network.to(device, memory_format=memory_format(device, default_precision(device)))
    return network.eval(), settings


# ---------- Command line --------------------------------------------------------------------------


def main():
    args = parse_args()
    if args.curves:
        return write(draw_curves(args.runs), args.curves)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = [load_run(run, device) for run in args.runs]
    network, settings = runs[-1]
    size = settings["height"], settings["width"]
    if args.query:
        query = Split(find_images(args.query), None, None)
    else:
        name = args.dataset or settings["dataset"]
        splits = load_dataset(name, args.data_dir or settings["data_dir"])
        _, query, gallery = splits.values()

    if args.attention:
        return write(draw_attention(network, query.paths[:6], *size), args.attention)

    # mAP and CMC, or your own photos
    aps = None
    if args.query:
        gallery = Split(find_images([args.gallery]), None, None)
        print(f"searching {len(gallery.paths)} images for {len(query.paths)}")
    else:
        print(describe(name, splits) + "\n")
        table = []
        for run, (network, settings) in zip(args.runs, runs, strict=True):
            size = settings["height"], settings["width"]
            ranking = evaluate(network, query, gallery, *size, args.workers)
            aps = ranking.average_precisions
            table.append(ranking.metrics())
            print(f"{run:<22}  {summary(table[-1])}")
        # Not in the paper: the population's deviation, as the paper's seem to be.
        if len(runs) > 1:
            for title, statistic in ("mean", np.mean), ("standard deviation", np.std):
                values = {key: statistic([metrics[key] for metrics in table]) for key in table[0]}
                print(f"{title:<22}  {summary(values)}")

    # nearest images, printed for photos, drawn for --ranking
    if args.query or args.ranking:
        features = extract_features(network, query.paths + gallery.paths, *size, args.workers)
        picture = search(query, gallery, features, aps)
        if args.ranking:
            write(picture, args.ranking)


def parse_args():
    parser = argparse.ArgumentParser(
        usage="%(prog)s RUN [RUN ...] [options]",
        description="Evaluate trained runs: mAP, Rank-1, Rank-5 and Rank-10 of single queries.",
    )
    add = parser.add_argument
    add("runs", nargs="+", help="folder of a run; several give mean and standard deviation, too")
    add("--dataset", choices=DATASETS, help="data set to evaluate on [the last RUN's]")
    add("--data-dir", help="folder that holds the data sets [as in training]")
    add("--workers", type=int, default=2, help="data-loader processes [%(default)s]")
    add(
        "--ranking",
        type=png,
        help="also draw this PNG: queries and their nearest images, for the last RUN",
    )
    add("--attention", type=png, help="only draw this PNG: attention of the last RUN, as in Fig. 3")
    add("--curves", type=png, help="only draw this PNG: losses and mAP of the RUNs")
    add("--query", nargs="+", help="your own photos, each cropped to one person, or their folders")
    add("--gallery", help="folder to search for them, with its subfolders")
    args = parser.parse_args()
    if bool(args.query) != bool(args.gallery) and not args.attention:
        parser.error("--query and --gallery go together")
    return args


def png(text):
    """An argparse type: pictures that can be written."""
    path = Path(text)
    if path.suffix != ".png" or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not a .png in a folder that can be written")
    return path


def write(picture, path):
    picture.save(path)
    print(f"wrote {path}")


def find_images(names):
    """The files that are named, and the images in the folders that are, with their subfolders.

    Hidden files and folders (.name, @eaDir) are passed over. Raises DataError if a folder has none.
    """
    paths = []
    for name in names:
        if not os.path.isdir(name):
            paths.append(name)
            continue
        # glob goes into linked folders, but not into hidden ones
        inside = [os.path.join(name, x) for x in glob("**/*", root_dir=name, recursive=True)]
        found = [x for x in inside if x.lower().endswith(EXTENSIONS) and "@eaDir" not in x]
        if not found:
            raise DataError(f"{name!r} holds no images ({', '.join(EXTENSIONS)})")
        paths += sorted(filter(os.path.isfile, found))
    return paths


def nearest(query, gallery, skip=None):
    """A list of (index, distance) of the ten embeddings nearest to a query's, nearest first.

    query (D,), gallery (N, D); skip (N,) bool, which to pass over.
    """
    distances = np.linalg.norm(gallery - query, axis=1)
    order = np.argsort(distances, kind="stable")
    if skip is not None:
        order = order[~skip[order]]
    return [(i, distances[i]) for i in order[:10]]


def search(query, gallery, features, aps):
    """A picture of up to ten queries with their five nearest images.

    features: embeddings of queries, then the gallery's. aps are the queries' average precisions:
    queries are chosen, from the highest down. Photos have neither these nor identities: the
    first ten are drawn, and the ten nearest images of each photo are printed.
    """
    query_features, gallery_features = np.split(features, [len(query.paths)])
    chosen = range(len(query.paths))
    if aps is not None:
        order = np.argsort(-aps)[: np.count_nonzero(~np.isnan(aps))]
        chosen = order[:: math.ceil(len(order) / 10)]
    rows = []
    for q in chosen:
        path = query.paths[q]
        if aps is None:
            print(path)
            row = [tile(path, BLUE, "query")]
            for i, distance in nearest(query_features[q], gallery_features):
                print(f"{distance:10.3f}  {gallery.paths[i]}")
                row.append(tile(gallery.paths[i], "white", f"{distance:.2f}"))
        else:
            same_id = gallery.ids == query.ids[q]
            own = same_id & (gallery.cams == query.cams[q])
            row = [tile(path, BLUE, f"camera {query.cams[q]}\nAP {100 * aps[q]:.1f} %")]
            for i, distance in nearest(query_features[q], gallery_features, own):
                caption = f"camera {gallery.cams[i]}\n{distance:.2f}"
                row.append(tile(gallery.paths[i], GREEN if same_id[i] else RED, caption))
        if len(rows) < 10:
            rows.append(row[:6])
    return draw_rows(rows, "Queries (blue), their nearest images and distances")


# ---------- Pictures ------------------------------------------------------------------------------

TILE = (112, 224)  # width and height of an image in a picture
BLUE = "#3060c0"  # a query
GREEN = "#20a040"  # the same person
RED = "#d03030"  # another


def tile(path, frame, caption):
    """An image to draw, its frame's colour, and a caption of two lines. Raises DataError."""
    return TF.to_pil_image(read_image(path)).resize(TILE), frame, caption


def draw_rows(rows, title):
    """Rows of tiles, each a framed image with its caption below."""
    width = TILE[0] + 14
    height = TILE[1] + 52
    size = width * max(map(len, rows)) + 4, height * len(rows) + 32
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((9, 8), title, "black", font_size=15)
    for i, row in enumerate(rows):
        for j, (image, frame, caption) in enumerate(row):
            left = 4 + j * width
            top = 32 + i * height
            picture.paste(ImageOps.expand(image, 5, frame), (left, top))
            draw.text((left + 5, top + TILE[1] + 11), caption, "black", font_size=15)
    return picture


@torch.no_grad()
def sona_input(network, images):
    """The first SONA module of a network in eval mode and its input (B, C, h, w), for images.

    Raises DataError if it has none.
    """
    modules = [module for module in network.modules() if isinstance(module, SONA)]
    if not modules:
        raise DataError("the network has no SONA module to draw")
    inputs = []
    # extend returns None, which leaves the input as it is
    hook = modules[0].register_forward_pre_hook(lambda _, arguments: inputs.extend(arguments))
    network(images)
    hook.remove()
    return modules[0], inputs[0]


# Reference points like those of Fig. 3, as shares of height and width.
POINTS = {
    "head": (0.1, 0.5),
    "torso": (0.33, 0.5),
    "legs": (0.7, 0.45),
    "shoes": (0.93, 0.45),
    "background": (0.2, 0.08),
}


@torch.inference_mode()
def draw_attention(network, paths, height, width):
    """Fig. 3, in eval mode, of the first SONA module: a row per image, a column per point."""
    device = next(network.parameters()).device
    drawn = []
    for path in paths:
        image = TF.resize(read_image(path), [height, width])
        sona, features = sona_input(network, normalize(image[None].to(device)))
        rows, columns = features.shape[2:]
        weights = rows * columns * sona.attention(features)[0].cpu()  # (HW, HW), 1 where uniform
        row = [tile(path, "white", "")]
        for name, (top, left) in POINTS.items():
            point = int(top * rows) * columns + int(left * columns)
            values, strongest = weights[point].topk(10)
            marked = row[0][0].copy()
            for position in (*strongest.tolist(), point):
                x = (position % columns + 0.5) / columns * TILE[0]
                y = (position // columns + 0.5) / rows * TILE[1]
                colour = "#20e040" if position == point else "#ff2020"
                ImageDraw.Draw(marked).ellipse((x - 4, y - 4, x + 4, y + 4), colour, "black")
            row.append((marked, "white", f"{name}\n{100 * (values[0] - 1):+.2g} %"))
        drawn.append(row)
    title = "Green: a point. Red: the ten it attends to most. %: the strongest above uniform"
    return draw_rows(drawn, title)


def draw_curves(runs):
    """Losses and mAP of runs over their epochs; prints their average losses (Sec. 3.4)."""
    logs = [list(map(json.loads, open(Path(run, "log.jsonl")))) for run in runs]
    epochs = min(map(len, logs))
    averages = [np.mean([record["loss"] for record in log[:epochs]]) for log in logs]
    print(f"average loss of {epochs} epochs, and its difference from the first run's")
    for run, average in zip(runs, averages, strict=True):
        print(f"{average:9.4f} {average / averages[0] - 1:+8.2%}  {run}")

    picture = Image.new("RGB", (840, 320 + 20 * len(runs)), "white")
    draw = ImageDraw.Draw(picture)
    draw.font = ImageFont.load_default(13)
    colours = "blue orange green red purple brown gray black".split() * len(runs)
    for left, title, key, unit in (60, "loss", "loss", 1), (480, "mAP (%)", "mean_ap", 100):
        curves = [[(r["epoch"] + 1, unit * r[key]) for r in log if key in r] for log in logs]
        # the largest epoch and value of all curves, at least 1 and 0
        x_tick, y_tick = map(tick, np.max(sum(curves, [(1, 0)]), 0))
        draw.text((left, 8), title, "black")
        draw.text((left + 170, 294), "epoch", "black", anchor="mt")
        for n in range(6):
            draw.text((left + 68 * n, 276), f"{n * x_tick}", "black", anchor="mt")
            draw.text((left - 6, 270 - 48 * n), f"{n * y_tick}", "black", anchor="rm")
            draw.line((left, 270 - 48 * n, left + 340, 270 - 48 * n), "#d0d0d0")
        for i, curve in enumerate(curves):
            points = [(left + 68 * x / x_tick, 270 - 48 * y / y_tick) for x, y in curve]
            draw.line(points, colours[i], 2)
            draw.text((60, 312 + 20 * i), runs[i], colours[i])
    return picture


def tick(high):
    """The round number of which five reach high."""
    rounds = (n * 10**k for k in range(9) for n in (1, 2, 5))
    return next(n for n in rounds if 5 * n >= high)


if __name__ == "__main__":
    run_program(main)
