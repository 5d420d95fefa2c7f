# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""Evaluate runs of SONA-Net (Xia et al., ICCV 2019): CMC and mAP (Sec. 3.3).

Usage:
    python evaluate.py runs/toy                              # mAP and Rank-1, 5, 10
    python evaluate.py runs/market1501 --dataset dukemtmc    # on a data set other than the run's
    python evaluate.py runs/a runs/b runs/c runs/d           # mean and standard deviation of runs
    python evaluate.py runs/toy --ranking ranking.png        # queries with their nearest images
    python evaluate.py runs/toy --attention attention.png    # Fig. 3
"""

import argparse
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

from data import DATASETS, ImageDataset, Split, describe, load_dataset, normalize, read_image
from losses import gather
from model import SONA, SONANet


class Ranking(NamedTuple):
    """Metrics of a ranking, as fractions."""

    cmc: np.ndarray  # (max_rank,): [k - 1] is the share of queries with a match in the first k
    mean_ap: float
    average_precisions: np.ndarray  # (queries,), nan if left out

    def metrics(self) -> dict[str, float]:
        """The four metrics of the paper's tables. Raises IndexError if max_rank was below 10."""
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

    features (N, D), ids and cams (N,) integers: arrays, lists or tensors. For each query, gallery
    images of its own identity from its own camera do not count, nor does junk (identity -1,
    Sec. 3.1). Not in the paper: distances are Euclidean, between raw embeddings; at equal distances
    a true match ranks last; AP is the mean of the precisions at each true match; queries without a
    true match from another camera are left out.

    To copy it, take Ranking, `import numpy as np` and `from typing import NamedTuple`, too.

    Raises ValueError if lengths differ, features are not finite, or no query has a true match.
    """
    queries = np.asarray(query_features)
    query_ids = np.asarray(query_ids)
    query_cams = np.asarray(query_cams)
    gallery = np.asarray(gallery_features)
    gallery_ids = np.asarray(gallery_ids)
    gallery_cams = np.asarray(gallery_cams)
    if not len(queries) == len(query_ids) == len(query_cams):
        raise ValueError("queries, their ids and their cams differ in length")
    if not len(gallery) == len(gallery_ids) == len(gallery_cams):
        raise ValueError("gallery, its ids and its cams differ in length")

    # The origin moves to the gallery's first image: |g|^2 / 2 - qg loses precision far from it.
    dtype = np.result_type(queries, gallery, np.float32)
    origin = gallery[0].astype(dtype)
    queries = queries.astype(dtype) - origin
    gallery = gallery.astype(dtype) - origin
    half_norms = np.einsum("nd,nd->n", gallery, gallery) / 2

    average_precisions = np.full(len(queries), np.nan)
    hits = np.zeros(max_rank)  # [k - 1]: the number of queries with a match in the first k
    valid = gallery_ids != -1  # junk does not count
    slab = max(1, 2**23 // len(gallery))  # queries at a time: 32 MB of distances in float32
    for start in range(0, len(queries), slab):
        # Keys that sort as distances do: |q - g|^2 / 2 less |q|^2 / 2, the same for all g.
        keys = half_norms - queries[start : start + slab] @ gallery.T  # (slab, gallery)
        if not np.isfinite(keys).all():
            raise ValueError("the features hold nan, inf or numbers too large to square")
        for i, row in enumerate(keys, start):
            same_id = gallery_ids == query_ids[i]
            matches = np.sort(row[valid & same_id & (gallery_cams != query_cams[i])])
            if len(matches) == 0:
                continue
            others = np.sort(row[valid & ~same_id])
            # A match's rank, from 0: the others that are nearer or as near, and the matches before.
            ranks = np.searchsorted(others, matches, side="right") + np.arange(len(matches))
            average_precisions[i] = np.mean(np.arange(1, len(matches) + 1) / (ranks + 1))
            hits[ranks[0] :] += 1

    counted = np.count_nonzero(~np.isnan(average_precisions))
    if counted == 0:
        raise ValueError("no query has a true match from another camera")
    return Ranking(hits / counted, float(np.nanmean(average_precisions)), average_precisions)


@torch.inference_mode()
def extract_features(
    network: nn.Module, paths: Sequence[str | Path], height: int, width: int, workers: int = 0
) -> np.ndarray:
    """(N, 1536) test embeddings of images: the mean over an image and its mirror image (Sec. 3.2).

    height and width are in pixels; returns a float32 array. Under torch.distributed, the processes
    share the images, all use the first one's batch-norm statistics, and each returns all
    embeddings. Leaves the network in eval mode. Raises OSError if an image cannot be read.
    """
    device = next(network.parameters()).device
    rank = 0
    share = len(paths)  # of this process
    if dist.is_initialized():
        rank = dist.get_rank()
        share = math.ceil(len(paths) / dist.get_world_size())
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)
    # Equal shares: past the end, images from the start again, which are cut off below.
    own = [paths[i % len(paths)] for i in range(rank * share, (rank + 1) * share)]
    dataset = ImageDataset(own, [0] * share, height, width)  # labels are not used
    network.eval()
    features = []
    loader = DataLoader(dataset, batch_size=64, num_workers=workers)
    for i, (images, _) in enumerate(loader):
        progress(f"image {loader.batch_size * i} of {share}")
        images = normalize(images.to(device))
        embeddings = network(torch.cat([images, images.flip(3)]))  # (2B, 1536)
        features.append(embeddings.unflatten(0, (2, -1)).mean(0))
    progress("")  # clears the line
    return gather(torch.cat(features))[: len(paths)].cpu().numpy()


def extract_splits(
    network: nn.Module, query: Split, gallery: Split, height: int, width: int, workers: int = 0
) -> list[np.ndarray]:
    """extract_features of the queries and of the gallery, read together by the same workers."""
    features = extract_features(network, query.paths + gallery.paths, height, width, workers)
    return np.split(features, [len(query.paths)])


def evaluate(
    network: nn.Module, query: Split, gallery: Split, height: int, width: int, workers: int = 0
) -> Ranking:
    """The Ranking of a gallery for its queries by a network's embeddings (Sec. 3.3).

    Arguments and errors are those of extract_features and evaluate_ranking.
    """
    features = extract_splits(network, query, gallery, height, width, workers)
    return evaluate_ranking(*features, query.ids, gallery.ids, query.cams, gallery.cams)


def load_run(run: str | Path, device: str | torch.device = "cpu") -> tuple[SONANet, dict]:
    """The network in a run's folder, in eval mode, and the settings of its training.

    Raises FileNotFoundError if the folder holds no last.pt.
    """
    checkpoint = torch.load(Path(run, "last.pt"), map_location="cpu", weights_only=True)
    settings = checkpoint["settings"]
    network = SONANet(len(checkpoint["identities"]), settings["sona"], settings["drop"])
    network.load_state_dict(checkpoint["network"])
    network.to(device, memory_format=torch.channels_last)
    return network.eval(), settings


# ---------- Command line --------------------------------------------------------------------------


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = [load_run(run, device) for run in args.runs]
    _, last = runs[-1]  # settings of the last run, which the pictures show, too
    name = args.dataset or last["dataset"]
    splits = load_dataset(name, args.data_dir or last["data_dir"])
    _, query, gallery = splits.values()
    print(describe(name, splits) + "\n")

    table = []
    for run, (network, settings) in zip(args.runs, runs, strict=True):
        size = settings["height"], settings["width"]
        features = extract_splits(network, query, gallery, *size, args.workers)
        ranking = evaluate_ranking(*features, query.ids, gallery.ids, query.cams, gallery.cams)
        table.append(ranking.metrics())
        print(f"{run:<22}  {summary(table[-1])}", flush=True)
    if len(runs) > 1:
        # Not in the paper: which deviation. Its tables fit the population's.
        for title, statistic in [("mean", np.mean), ("standard deviation", np.std)]:
            values = {key: statistic([metrics[key] for metrics in table]) for key in table[0]}
            print(f"{title:<22}  {summary(values)}")

    # The loop's variables are now the last run's.
    if args.ranking:
        draw_ranking(query, gallery, *features, ranking.average_precisions).save(args.ranking)
    if args.attention:
        draw_attention(network, query.paths[:6], *size).save(args.attention)


def parse_args() -> argparse.Namespace:
    """The runs and flags of the command line."""
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
        metavar="PNG",
        help="also draw ten queries with their nearest images, for the last RUN",
    )
    add("--attention", metavar="PNG", help="also draw the attention of the last RUN, as in Fig. 3")
    return parser.parse_args()


def summary(metrics: dict[str, float]) -> str:
    """The four metrics in the paper's form, in per cent."""
    names = {"mean_ap": "mAP", "rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10"}
    return "  ".join(f"{name}{100 * metrics[key]:7.2f}" for key, name in names.items())


def progress(text: str) -> None:
    """Shows text on a terminal until the next line is printed."""
    if sys.stdout.isatty():
        print(f"  {text:<30}", end="\r", flush=True)


# ---------- Pictures ------------------------------------------------------------------------------

TILE = (112, 224)  # width and height of an image in a picture
BLUE = "#3060c0"  # a query
GREEN = "#20a040"  # the same person
RED = "#d03030"  # another


def draw_ranking(
    query: Split,
    gallery: Split,
    query_features: np.ndarray,
    gallery_features: np.ndarray,
    average_precisions: np.ndarray,
) -> Image.Image:
    """A row per query with its five nearest images: ten queries, from the highest AP down."""
    counted = np.flatnonzero(~np.isnan(average_precisions))
    by_ap = counted[np.argsort(-average_precisions[counted])]
    ten_evenly = np.linspace(0, len(by_ap) - 1, min(10, len(by_ap))).round().astype(int)
    rows = []
    for q in by_ap[ten_evenly]:
        caption = f"camera {query.cams[q]}\nAP {100 * average_precisions[q]:.1f} %"
        row = [(thumbnail(query.paths[q]), BLUE, caption)]
        same_id = gallery.ids == query.ids[q]
        valid = ~same_id | (gallery.cams != query.cams[q])  # junk is left out by read_split
        distances = np.linalg.norm(gallery_features - query_features[q], axis=1)
        order = np.argsort(distances)
        for i in order[valid[order]][:5]:
            caption = f"camera {gallery.cams[i]}\n{distances[i]:.2f}"
            row.append((thumbnail(gallery.paths[i]), GREEN if same_id[i] else RED, caption))
        rows.append(row)
    return draw_rows(rows, "Queries (blue), their nearest images and distances")


# Reference points like those of Fig. 3, as shares of height and width.
POINTS = {
    "head": (0.13, 0.5),
    "torso": (0.33, 0.5),
    "legs": (0.7, 0.45),
    "shoes": (0.93, 0.45),
    "background": (0.2, 0.08),
}


@torch.inference_mode()
def draw_attention(
    network: nn.Module, paths: Sequence[str | Path], height: int, width: int
) -> Image.Image:
    """Fig. 3, in eval mode, of the first SONA module: a row per image, a column per point."""
    device = next(network.parameters()).device
    drawn = []
    for path in paths:
        image = TF.resize(read_image(path), [height, width])
        sona, features = sona_input(network, normalize(image[None].to(device)))
        map_height, map_width = features.shape[2:]
        positions = map_height * map_width
        relative = positions * sona.attention(features)[0].cpu()  # (HW, HW), 1 where uniform
        photo = thumbnail(path)
        row = [(photo, "white", "")]
        for name, (top, left) in POINTS.items():
            point = int(top * map_height) * map_width + int(left * map_width)
            values, strongest = relative[point].topk(min(10, positions))
            marked = photo.copy()
            for position in [*strongest.tolist(), point]:
                x = (position % map_width + 0.5) / map_width * TILE[0]
                y = (position // map_width + 0.5) / map_height * TILE[1]
                colour = "#20e040" if position == point else "#ff2020"
                ImageDraw.Draw(marked).ellipse((x - 4, y - 4, x + 4, y + 4), colour, "black")
            row.append((marked, "white", f"{name}\n{100 * (values[0] - 1):+.2g} %"))
        drawn.append(row)
    title = "Green: a point. Red: the ten it attends to most. %: the strongest above uniform"
    return draw_rows(drawn, title)


def sona_input(network: nn.Module, images: Tensor) -> tuple[SONA, Tensor]:
    """The first SONA module of a network in eval mode and its input (B, C, h, w), for images.

    Raises ValueError if it has none.
    """
    sona = next((module for module in network.modules() if isinstance(module, SONA)), None)
    if sona is None:
        raise ValueError("the network has no SONA module, so there is no attention to draw")
    inputs = []

    def remember(module: nn.Module, arguments: tuple[Tensor]) -> None:
        inputs.append(arguments[0])

    hook = sona.register_forward_pre_hook(remember)
    network(images)
    hook.remove()
    return sona, inputs[0]


def thumbnail(path: str | Path) -> Image.Image:
    """An image, as large as a TILE."""
    return TF.to_pil_image(read_image(path)).resize(TILE)


def draw_rows(rows: list[list[tuple[Image.Image, str, str]]], title: str) -> Image.Image:
    """Rows of images, each with a frame's colour and a caption of two lines below it."""
    width = TILE[0] + 14
    height = TILE[1] + 52
    size = width * max(map(len, rows)) + 4, height * len(rows) + 32
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((9, 8), title, "black", font_size=15)
    for i, row in enumerate(rows):
        for j, (image, colour, caption) in enumerate(row):
            left = 4 + j * width
            top = 32 + i * height
            picture.paste(ImageOps.expand(image, 5, colour), (left, top))
            draw.text((left + 5, top + TILE[1] + 11), caption, "black", font_size=15)
    return picture


if __name__ == "__main__":
    main()
