# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""Evaluate trained runs of SONA-Net (Xia et al., ICCV 2019): CMC and mAP, single query, no re-ranking (Sec. 3.3).

Usage:
    python evaluate.py runs/toy                               # mAP and Rank-1, 5, 10 on the run's own data set
    python evaluate.py runs/market --dataset dukemtmc         # on another one
    python evaluate.py runs/a runs/b runs/c runs/d            # the paper's mean and standard deviation of four runs
    python evaluate.py runs/a runs/b --curves curves.png      # losses, learning rate and mAP over the epochs (Sec. 3.4)
    python evaluate.py runs/toy --ranking ranking.png         # queries with their nearest gallery images, to look at
    python evaluate.py runs/toy --attention attention.png     # Fig. 3
    python evaluate.py runs/toy --time                        # Sec. 3.5
    python evaluate.py runs/toy --query a.jpg b.jpg --gallery photos/     # your own photos
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from data import DATASETS, EXTENSIONS, DataError, ImageDataset, Split, describe, load_dataset, normalize, read_image
from losses import gather
from model import SONA, SONANet, WeightsError


class Ranking(NamedTuple):
    """How well queries find their identity, as fractions."""

    cmc: np.ndarray  # (max_rank,): [k - 1] is the share of queries with a true match among the first k
    mean_ap: float
    average_precisions: np.ndarray  # (queries,), nan where a query was left out

    def figures(self) -> dict[str, float]:
        """The four figures of the paper's tables, as fractions; max_rank must be 10 or more."""
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
    """CMC and average precision of single queries, by the Market-1501 protocol (Sec. 3.3; Zheng et al. 2015).

    features (N, D), ids and cams (N,). For each query, gallery images of its own identity under its own
    camera do not count, nor does junk (identity -1, Sec. 3.1). Not in the paper: distances are Euclidean, on raw
    features, in their precision, at least float32; equal distances rank in gallery order; AP is the mean of the
    precisions at each true match; queries without a true match under another camera are left out of the mean.

    Raises ValueError where shapes do not fit, features are not finite, or no query has a true match.

    No row of distances is sorted: a match's rank is a count of the images nearer than it. Memory is that of the
    features once more and a slab of distances, whatever the size of the gallery.
    """
    dtype = np.result_type(query_features, gallery_features, np.float32)
    query_features, gallery_features = (np.asarray(x, dtype) for x in (query_features, gallery_features))
    query_ids, gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
    query_cams, gallery_cams = np.asarray(query_cams), np.asarray(gallery_cams)
    shapes = query_features.shape, gallery_features.shape
    if query_features.ndim != 2 or shapes[0][1:] != shapes[1][1:] or not len(gallery_features):
        raise ValueError(f"the features must be (N, D), with one D and N > 0, not {shapes[0]} and {shapes[1]}")
    for side, features, ids, cams in (
        ("query", query_features, query_ids, query_cams),
        ("gallery", gallery_features, gallery_ids, gallery_cams),
    ):
        if not ids.shape == cams.shape == features.shape[:1]:
            raise ValueError(f"{side}: {len(features)} features, but ids {ids.shape} and cams {cams.shape}")

    # Moving all features changes no distance. Far from 0 the products below lose digits, so one becomes the origin.
    with np.errstate(invalid="ignore", over="ignore"):
        query_features, gallery_features = query_features - gallery_features[0], gallery_features - gallery_features[0]
        query_norms, half_norms = (np.einsum("nd,nd->n", x, x) / 2 for x in (query_features, gallery_features))
    if not (np.isfinite(query_norms).all() and np.isfinite(half_norms).all()):
        raise ValueError("the features hold nan, inf or numbers too large to square; did the training go wrong?")
    half_norms[gallery_ids == -1] = np.inf  # junk comes last, behind every match

    by_id = np.argsort(gallery_ids, kind="stable")
    first = np.searchsorted(gallery_ids[by_id], query_ids, "left")
    end = np.searchsorted(gallery_ids[by_id], query_ids, "right")
    average_precisions = np.full(len(query_ids), np.nan)
    hits = np.zeros(max_rank)
    slab = max(1, 2**23 // len(gallery_ids))  # rows of 8M distances in all, 32 MB in float32
    buffer = np.empty((min(slab, len(query_ids)), len(gallery_ids)), dtype)
    for start in range(0, len(query_ids), slab):
        # |q - g|^2 / 2 without |q|^2 / 2, which is the same for all g, is |g|^2 / 2 - qg: one matrix product.
        queries = query_features[start : start + slab]
        distances = np.matmul(queries, gallery_features.T, out=buffer[: len(queries)])  # (slab, gallery)
        np.subtract(half_norms, distances, out=distances)
        for query, row in enumerate(distances, start):
            same_id = by_id[first[query] : end[query]]
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
        raise ValueError("no query has a true match under another camera; are the identities and cameras right?")
    return Ranking(hits / counted, float(np.nanmean(average_precisions)), average_precisions)


def summary(figures: dict[str, float]) -> str:
    """The four figures in the paper's form, in per cent."""
    names = {"mean_ap": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
    return "  ".join(f"{name}{100 * figures[key]:7.2f}" for key, name in names.items())


# ---------------------------------------------------------------------------------------------------
# Features and runs


@torch.inference_mode()
def extract_features(network: nn.Module, paths: list[str], height: int, width: int, workers: int = 0) -> np.ndarray:
    """(N, 1536) test embeddings of image files: the mean over an image and its mirror image (Sec. 3.2).

    Not in the paper: in float32, also of a run in bf16 or fp16, and without the TensorFloat-32 that cuDNN would
    take for it. Under torch.distributed the processes share the images, and each returns all features. Leaves the
    network in eval mode.
    """
    device = next(network.parameters()).device
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = math.ceil(len(paths) / processes)  # equal: the last processes fill theirs up from the first image on
    own = [paths[i % len(paths)] for i in range(rank * share, (rank + 1) * share)]
    images = ImageDataset(own, height, width)
    loader = DataLoader(images, batch_size=64, num_workers=workers, pin_memory=device.type == "cuda")
    network.eval()
    features = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        for batch, _ in loader:
            batch = normalize(batch.to(device, non_blocking=True))
            both = network(torch.cat([batch, batch.flip(3)]))  # (2B, 1536)
            features.append(both.unflatten(0, (2, -1)).mean(0))
    return gather(torch.cat(features))[: len(paths)].cpu().numpy()


def evaluate(
    network: nn.Module, query: Split, gallery: Split, height: int, width: int, workers: int = 0
) -> tuple[list[np.ndarray], Ranking]:
    """The query's and the gallery's features, and their ranking; prints how many queries were left out.

    Raises DataError where features are not finite.
    """
    features = [extract_features(network, split.paths, height, width, workers) for split in (query, gallery)]
    try:
        ranking = evaluate_ranking(*features, query.ids, gallery.ids, query.cams, gallery.cams)
    except ValueError as error:
        raise DataError(str(error)) from error
    if left_out := np.count_nonzero(np.isnan(ranking.average_precisions)):
        print(f"  {left_out} of {len(query.ids)} queries left out: no true match under another camera")
    return features, ranking


def load_run(run: str | Path, device: torch.device | str = "cpu") -> tuple[SONANet, dict]:
    """The trained network of a run's folder, in eval mode, and the settings it was trained with.

    Raises WeightsError where the folder holds no finished run or a damaged one.
    """
    path = Path(run, "model.pt")
    if not path.is_file():
        unfinished = Path(run, "last.pt").is_file()
        hint = "its training has not ended; finish it with train.py --resume" if unfinished else "train.py makes one"
        raise WeightsError(f"{run} is not the folder of a finished run: no {path.name} in it; {hint}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        settings = saved["settings"]
        network = SONANet(saved["num_classes"], settings["sona"], settings["drop"])
        network.load_state_dict(saved["model"])
    except ValueError as error:  # a variant that this model.py does not know
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise WeightsError(f"{path} is damaged or not a model of train.py; copy or train it again") from error
    return network.to(device, memory_format=torch.channels_last).eval(), settings


# ---------------------------------------------------------------------------------------------------
# Command line


def usable_cores() -> int:
    """The cores that this process may use, which in a job may be fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_line(error: Exception) -> str:
    """An error's message. From a worker process its traceback comes first, and the error's name."""
    return (str(error) or repr(error)).splitlines()[-1].removeprefix("data.DataError: ")


# Settings in which a run and its resumption may differ, and so may runs to average.
CHANGEABLE = {"data_dir", "output", "workers", "eval_every", "resume", "recompute"}


def differences(first: dict, second: dict, free: set[str] = CHANGEABLE) -> str:
    """The flags in which two runs' settings differ, but for the free ones; empty if in none."""
    return "; ".join(
        f"--{name.replace('_', '-')} {first.get(name)} and {value}"
        for name, value in second.items()
        if name not in free and first.get(name) != value
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s RUN [RUN ...] [flags; --help lists them]",
        description="Evaluate trained runs: mAP and CMC, single query, no re-ranking.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; of several, mean and deviation follow")
    parser.add_argument("--dataset", choices=DATASETS, help="rank another set than the run's own")
    parser.add_argument("--data-dir", help="where the data sets' folders lie [as in the run's training]")
    workers = "processes that read images [%(default)s]"
    parser.add_argument("--workers", type=int, default=min(4, usable_cores()), help=workers)
    parser.add_argument("--ranking", metavar="PNG", help="draw queries with their nearest images")
    parser.add_argument("--features", metavar="NPZ", help="save embeddings with paths, identities and cameras")
    parser.add_argument("--seed", type=int, default=0, help="which queries the pictures show [%(default)s]")

    photos = parser.add_argument_group("your own photos, crops of one person each, instead of a data set")
    photos.add_argument("--query", nargs="+", metavar="IMAGE", help="search for these, or show their --attention")
    photos.add_argument("--gallery", metavar="FOLDER", help="where to search, with its subfolders")

    instead = parser.add_argument_group("instead of a ranking").add_mutually_exclusive_group()
    instead.add_argument("--attention", metavar="PNG", help="draw SONA's attention, as in Fig. 3")
    instead.add_argument("--curves", metavar="PNG", help="draw the training of runs, and compare their losses")
    instead.add_argument("--time", action="store_true", help="time the network with SONA and without, as in Sec. 3.5")
    args = parser.parse_args()

    endings = {args.ranking: ".png", args.attention: ".png", args.curves: ".png", args.features: ".npz"}
    for path, ending in endings.items():
        if path and (Path(path).suffix != ending or not Path(path).parent.is_dir()):
            parser.error(f"{path}: must end in {ending} and lie in a folder that exists")
    ranked = args.ranking or args.features or args.gallery
    if ranked and (args.time or args.attention or args.curves):
        parser.error("--ranking, --features and --gallery do not go with --time, --attention or --curves")
    if len(args.runs) > 1 and (ranked or args.time or args.attention):
        parser.error("--ranking, --features, --gallery, --attention and --time take one RUN")
    if args.query and args.dataset:
        parser.error("--query takes the place of a data set; leave out --dataset")
    if args.gallery and not args.query or args.query and not (args.gallery or args.attention):
        parser.error("--query and --gallery go together")
    return args


def main() -> None:
    args = parse_args()
    if args.curves:
        draw_curves(args.runs).save(args.curves)
        print(f"wrote {args.curves}")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    runs = [load_run(run, device) for run in args.runs]
    network, settings = runs[0]
    for run, (_, other) in zip(args.runs[1:], runs[1:], strict=True):
        if differing := differences(settings, other, CHANGEABLE | {"seed"}):
            sys.exit(f"error: {args.runs[0]} and {run} are not runs of one configuration: {differing}")
    if (args.time or args.attention) and not any(isinstance(module, SONA) for module in network.modules()):
        sys.exit(f"error: {args.runs[0]} has no SONA module to time or to draw")
    size = {key: settings[key] for key in ("height", "width")}
    if args.time:
        print_times(network, **size)
        return

    if args.query:
        query = unlabelled(args.query, camera=0)
        gallery = unlabelled(images_in(args.gallery), camera=1) if args.gallery else None
    else:
        name = args.dataset or settings["dataset"]
        splits = load_dataset(name, args.data_dir or settings["data_dir"])
        query, gallery = splits["query"], splits["gallery"]
    if args.attention:
        paths = args.query or two_views(query, gallery, args.seed)
        draw_attention(network, paths, **size).save(args.attention)
        print(f"wrote {args.attention}")
        return

    options = size | {"workers": args.workers}
    if args.query:
        features = [extract_features(network, split.paths, **options) for split in (query, gallery)]
        ranking = None
        for i, path in enumerate(query.paths):
            print(path)
            for j, distance in zip(*nearest(i, query, gallery, features), strict=True):
                print(f"{distance:10.3f}  {gallery.paths[j]}")
    else:
        print(describe(name, splits) + "\n")
        figures = []
        for run, (network, _) in zip(args.runs, runs, strict=True):
            features, ranking = evaluate(network, query, gallery, **options)
            figures.append(ranking.figures())
            print(f"{run:<22}  {summary(figures[-1])}")
        if len(runs) > 1:  # the deviation is the population's, as the paper's seem to be
            for title, function in (("mean", np.mean), ("standard deviation", np.std)):
                print(f"{title:<22}  {summary({key: function([f[key] for f in figures]) for key in figures[0]})}")
    if args.features:
        arrays = {}
        for side, split, x in zip(("query", "gallery"), (query, gallery), features, strict=True):
            arrays |= {f"{side}_{key}": value for key, value in {"features": x, **split._asdict()}.items()}
        np.savez(args.features, **arrays)
        print(f"wrote {args.features}")
    if picture := args.ranking or args.query and f"{args.runs[0]}/ranking.png":
        draw_ranking(query, gallery, features, ranking, args.seed).save(picture)
        print(f"wrote {picture}")


def unlabelled(paths: list[str], camera: int) -> Split:
    """Photos without identities; queries and gallery are of two cameras, so that nothing is left out."""
    return Split(paths, np.full(len(paths), -1), np.full(len(paths), camera))


def images_in(folder: str) -> list[str]:
    """The image files of a folder and its subfolders; prints how many others it passes over. Raises DataError."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    paths = sorted(str(path) for path in files if path.suffix.lower() in EXTENSIONS and path.name[0] != ".")
    if not paths:
        raise DataError(f"{folder} is no folder with images ({', '.join(EXTENSIONS)})")
    if len(paths) < len(files):
        print(f"{folder}: {len(files) - len(paths)} files are no images ({', '.join(EXTENSIONS)}) and passed over")
    return paths


# ---------------------------------------------------------------------------------------------------
# Time and pictures


@torch.inference_mode()
def print_times(network: SONANet, height: int, width: int, runs: int = 10) -> None:
    """Milliseconds of a forward pass with the SONA modules and without: of one image (Sec. 3.5), and of 32."""
    device = next(network.parameters()).device
    without = SONANet(1, "none").to(device, memory_format=torch.channels_last).eval()  # any weights take the same time
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    print(f"{f'{height} x {width}':<13}{'with SONA, ms':>19}{'without, ms':>19}{'ratio':>9}")
    for batch in (1, 32):
        images = torch.randn(batch, 3, height, width, device=device).to(memory_format=torch.channels_last)
        times = []
        for _ in range(3 + runs):  # three to warm up; both in turn, as a machine's speed drifts
            for variant in (network, without):
                wait()
                start = time.perf_counter()
                variant(images)
                wait()
                times.append(1000 * (time.perf_counter() - start))
        times = np.reshape(times, (-1, 2))[3:]
        mean, deviation = times.mean(0), times.std(0)
        cells = "".join(f"{m:>10.2f} +- {d:5.2f}" for m, d in zip(mean, deviation, strict=True))
        print(f"{batch:>2} at a time {cells}{mean[0] / mean[1]:>9.3f}")


@torch.no_grad()
def sona_input(network: nn.Module, images: Tensor) -> tuple[SONA, Tensor]:
    """The network's first SONA module, and its input (B, C, h, w) for normalised images (B, 3, height, width)."""
    sona = next(module for module in network.modules() if isinstance(module, SONA))
    inputs = []
    hook = sona.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    network(images)
    hook.remove()
    return sona, inputs[0]


POINTS = {  # reference points like those of Fig. 3, as shares of height and width
    "head": (0.1, 0.5),
    "torso": (0.33, 0.5),
    "legs": (0.7, 0.45),
    "shoes": (0.93, 0.45),
    "background": (0.2, 0.08),
}


def two_views(query: Split, gallery: Split, seed: int = 0, people: int = 3) -> list[str]:
    """Images of some people, each seen from two cameras, as in Fig. 3."""
    paths = []
    for i in np.random.default_rng(seed).permutation(np.unique(query.ids, return_index=True)[1]):
        others = np.flatnonzero((gallery.ids == query.ids[i]) & (gallery.cams != query.cams[i]))
        if len(others):
            paths += [query.paths[i], gallery.paths[others[0]]]
    return paths[: 2 * people]


@torch.inference_mode()
def draw_attention(network: nn.Module, paths: list[str], height: int, width: int) -> Image.Image:
    """Fig. 3: a row an image, a column a point of POINTS (green), and what it attends to: of several modules the first.

    Red where a weight is more than the uniform one, 1 / HW, and blue where it is less, in full colour from twice and
    half of it on: the same scale for all tiles. Below a tile its strongest weight, as a multiple of the uniform one.
    """
    device = next(network.parameters()).device
    tiles = []
    for path, (pixels, _) in zip(paths, ImageDataset(paths, height, width), strict=True):
        sona, x = sona_input(network, normalize(pixels[None].to(device)))
        rows, columns = x.shape[2:]
        weights = rows * columns * sona.attention(x)[0].cpu()  # (HW, HW), 1 if uniform
        image = thumbnail(path)
        tiles.append(tile(image, "white", Path(path).stem[:15]))
        for name, (top, left) in POINTS.items():
            weight = weights[int(top * rows) * columns + int(left * columns)].view(1, rows, columns)
            strength = weight.log2().clamp(-1, 1)
            picture = image
            for colour, part in (("red", strength), ("blue", -strength)):
                mask = TF.to_pil_image(0.8 * part.clamp(min=0)).resize(TILE, Image.Resampling.BILINEAR)
                picture = Image.composite(Image.new("RGB", TILE, colour), picture, mask)
            ImageDraw.Draw(picture).circle((left * TILE[0], top * TILE[1]), 5, "#20e040", "black")
            tiles.append(tile(picture, "white", f"{name}\nup to {weight.max():.2f} x"))
    title = "SONA's attention at the green point: red twice the uniform weight or more, blue half of it or less"
    return sheet(tiles, 1 + len(POINTS), title)


def nearest(i: int, query: Split, gallery: Split, features: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Query i's ten nearest gallery images and their distances, those of its own identity and camera left out."""
    distances = np.linalg.norm(features[1] - features[0][i], axis=1)
    other = np.flatnonzero((gallery.ids != query.ids[i]) | (gallery.cams != query.cams[i]))
    order = other[np.argsort(distances[other], kind="stable")[:10]]
    return order, distances[order]


def draw_ranking(
    query: Split, gallery: Split, features: list[np.ndarray], ranking: Ranking | None = None, seed: int = 0
) -> Image.Image:
    """A row a query, with its ten nearest gallery images.

    With a ranking: five queries at random and the five of lowest AP, true matches framed green, false ones
    red, and the CMC curve. Without one: all queries, as they have no labels.
    """
    chosen = range(len(query.paths))
    if ranking:
        counted = np.flatnonzero(~np.isnan(ranking.average_precisions))
        worst = counted[np.argsort(ranking.average_precisions[counted], kind="stable")]
        chosen = [*np.random.default_rng(seed).permutation(counted)[:5], *worst[:5]]

    def label(split: Split, j: int) -> str:
        return f"id {split.ids[j]} cam {split.cams[j]}" if ranking else Path(split.paths[j]).stem[:15]

    tiles = []
    for i in chosen:
        precision = f"\nAP {100 * ranking.average_precisions[i]:.1f}" if ranking else ""
        tiles.append(tile(thumbnail(query.paths[i]), "#3060c0", label(query, i) + precision))
        order, distances = nearest(i, query, gallery, features)
        for j, distance in zip(order, distances, strict=True):
            frame = "white" if not ranking else "#20a040" if gallery.ids[j] == query.ids[i] else "#d03030"
            tiles.append(tile(thumbnail(gallery.paths[j]), frame, f"{label(gallery, j)}\n{distance:.2f}"))
        tiles += [torch.full_like(tiles[0], 255)] * (10 - len(order))
    if ranking is None:
        return sheet(tiles, 11, "each query (blue) with its ten nearest images, and the distance")
    title = "five queries at random, then the five of lowest AP (blue), each with its ten nearest images: green the "
    picture = sheet(tiles, 11, title + "same person, red another; below, the distance")
    picture = ImageOps.expand(picture, (0, 0, CHART[0], 0), "white")
    curve = [(rank, 100 * share) for rank, share in enumerate(ranking.cmc[:20], 1)]
    title = f"% of queries with a match up to a rank; mAP {100 * ranking.mean_ap:.2f}"
    picture.paste(draw_chart(title, [curve], (0, 100)), (picture.width - CHART[0], 0))
    return picture


CHART = (420, 300)  # width and height of a chart
COLOURS = ["#3060c0", "#d07020", "#20a040", "#a03090", "#808080", "#b0a000", "#008080", "#c03030"]


def draw_chart(
    title: str, curves: list[list[tuple[float, float]]], span: tuple[float, float] | None = None
) -> Image.Image:
    """Curves of (x, y) points, one of COLOURS each, over the span of y, or as much as they need."""
    image = Image.new("RGB", CHART, "white")
    draw = ImageDraw.Draw(image)
    points = [point for curve in curves for point in curve]
    (left, low), (right, high) = (np.min(points, 0), np.max(points, 0)) if points else ((0, 0), (1, 1))
    low, high = span or (min(low, 0), high or 1)

    def at(x: float, y: float) -> tuple[float, float]:
        return 60 + 340 * (x - left) / max(right - left, 1), 270 - 240 * (y - low) / (high - low)

    for i in range(5):
        y = low + (high - low) * i / 4
        draw.line((at(left, y), at(right, y)), "#d0d0d0")
        draw.text((54, at(left, y)[1]), f"{y:.3g}", "black", font_size=12, anchor="rm")
        x = round(left + (right - left) * i / 4)
        draw.text((at(x, low)[0], 276), str(x), "black", font_size=12, anchor="mt")
    for curve, colour in zip(curves, COLOURS * len(curves), strict=False):
        draw.line([at(*point) for point in curve], colour, width=2)
        for point in curve[-1:]:  # seen even if it is the only one
            draw.circle(at(*point), 3, colour)
    draw.text((60, 8), title, "black", font_size=14)
    return image


def draw_curves(runs: list[str]) -> Image.Image:
    """The losses, the learning rate and mAP of runs over their epochs (Sec. 3.4), finished or not.

    Prints each run's average loss, and by how much it differs from the first one's. Raises DataError.
    """
    settings, logs = [], []
    for run in runs:
        try:
            settings.append(json.loads(Path(run, "args.json").read_text()))
            logs.append([json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()])
            logs[-1][0]["loss"]
        except (OSError, ValueError, LookupError) as error:
            raise DataError(f"{run} is no folder of a run that has been trained for an epoch: {error}") from error
    differing = [key for key in settings[0] if key not in CHANGEABLE and len({str(s.get(key)) for s in settings}) > 1]
    names = [
        " ".join([run, *(f"--{key.replace('_', '-')} {s.get(key)}" for key in differing)])
        for run, s in zip(runs, settings, strict=True)
    ]
    epochs = min(map(len, logs))
    averages = [np.mean([record["loss"] for record in log[:epochs]]) for log in logs]
    print(f"average loss of {epochs} epochs, and its difference from the first run's")
    for name, average in zip(names, averages, strict=True):
        print(f"{average:9.4f} {average / averages[0] - 1:+8.2%}  {name}")

    keys = ["global_triplet", "global_cross_entropy", "mean_ap", "local_triplet", "local_cross_entropy", "lr"]
    picture = Image.new("RGB", (3 * CHART[0], 2 * CHART[1] + 10 + 20 * len(runs)), "white")
    for i, key in enumerate(keys):
        points = [[(record["epoch"], record[key]) for record in log if key in record] for log in logs]
        picture.paste(draw_chart(key, points), (i % 3 * CHART[0], i // 3 * CHART[1]))
    for i, name in enumerate(names):
        y = 2 * CHART[1] + 10 + 20 * i
        ImageDraw.Draw(picture).line((60, y, 90, y), COLOURS[i % len(COLOURS)], width=3)
        ImageDraw.Draw(picture).text((100, y), name, "black", font_size=14, anchor="lm")
    return picture


TILE = (96, 192)  # width and height of an image on a sheet


def thumbnail(path: str) -> Image.Image:
    """An image file in the size of TILE. Raises DataError."""
    return TF.to_pil_image(TF.resize(read_image(path), TILE[::-1]))


def tile(image: Image.Image, frame: str, text: str) -> Tensor:
    """A thumbnail in a coloured frame with two lines of text below: (3, 236, 106) uint8."""
    canvas = ImageOps.expand(ImageOps.expand(image, 5, frame), (0, 0, 0, 34), "white")
    ImageDraw.Draw(canvas).multiline_text((5, TILE[1] + 11), text, "black", font_size=12, spacing=2)
    return TF.pil_to_tensor(canvas)


def sheet(tiles: list[Tensor], columns: int, title: str) -> Image.Image:
    """Tiles in rows below a title."""
    grid = TF.to_pil_image(make_grid(tiles, columns, padding=4, pad_value=255))
    image = ImageOps.expand(grid, (0, 28, 0, 0), "white")
    ImageDraw.Draw(image).text((9, 8), title, "black", font_size=14)
    return image


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except (DataError, WeightsError, OSError, torch.OutOfMemoryError) as error:
        sys.exit(f"error: {one_line(error)}")
