# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""Data of SONA-Net (Xia et al., ICCV 2019): data sets, sampler, augmentation, a drawn toy.

Usage:
    splits = load_dataset("market1501", "datasets")     # {"train": Split, "query", "gallery"}
    train = splits["train"]
    sampler = IdentitySampler(train.labels, ids_per_batch=32, images_per_id=4)
    loader = torch.utils.data.DataLoader(ImageDataset(train.paths, 384, 128), batch_sampler=sampler)
    for epoch in range(400):
        sampler.set_epoch(epoch)                        # else all epochs have the same batches
        for images, indices in loader:                  # (128, 3, 384, 128) uint8, (128,)
            batch, labels = augment(images), train.labels[indices]
"""

import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
NAMES = "<identity>_c<camera>_..., e.g. 0002_c1s1_000451_03.jpg"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Source(NamedTuple):
    """A data set in the Market-1501 layout."""

    words: str  # of its folder's name, lower case: "market 1501" for Market-1501-v15.09.15
    counts: dict[str, tuple[int, int]] = {}  # published (images, identities) (Table 1)


DATASETS = {
    "toy": Source("toy", {"train": (768, 64), "query": (200, 50), "gallery": (200, 50)}),
    # The gallery of Table 1, 19,732, less its 3,819 junk images (Sec. 3.1).
    "market1501": Source("market 1501", {"train": (12936, 751), "query": (3368, 750), "gallery": (15913, 750)}),
    "dukemtmc": Source("duke mtmc", {"train": (16522, 702), "query": (2228, 702), "gallery": (17661, 1110)}),
    "cuhk03": Source("cuhk label", {"train": (7368, 767), "query": (1400, 700), "gallery": (5328, 700)}),
    "cuhk03-detected": Source("cuhk detect", {"train": (7365, 767), "query": (1400, 700), "gallery": (5332, 700)}),
}


class DataError(ValueError):
    """Data that is missing or cannot be used; the message is one line for the user."""

    def __str__(self) -> str:  # without the traceback that a DataLoader's worker puts before it
        return super().__str__().rsplit("DataError: ", 1)[-1].strip()


# ---------- Data sets in the Market-1501 layout ---------------------------------------------------


class Split(NamedTuple):
    """The images of a folder, with their labels."""

    paths: list[str]
    ids: np.ndarray  # (N,) identities as in the file names; in a gallery 0 is a distractor
    cams: np.ndarray  # (N,) cameras

    @property
    def labels(self) -> Tensor:
        """(N,) the identities renumbered from 0, for a classifier."""
        return torch.from_numpy(np.unique(self.ids, return_inverse=True)[1])


def load_dataset(name: str, data_dir: str | Path) -> dict[str, Split]:
    """The train, query and gallery splits of a set in DATASETS, wherever it is in data_dir.

    The toy is drawn on first use. Raises DataError if the set is not found or cannot be used.
    """
    if name == "toy" and not Path(data_dir, "toy").exists():
        draw_toy(Path(data_dir, "toy"))
    folder = find_folder(name, data_dir)
    splits = {split: read_split(folder / images) for split, images in FOLDERS.items()}
    query, gallery = splits["query"], splits["gallery"]
    pairs = zip(query.ids, query.cams, strict=True)
    if not any(np.any((gallery.ids == i) & (gallery.cams != cam)) for i, cam in pairs):
        raise DataError(f"{folder}: no query has a match from another camera; names are {NAMES}")
    return splits


def find_folder(name: str, data_dir: str | Path) -> Path:
    """The first folder with the set's name and all FOLDERS: data_dir, or up to three levels below.

    Raises DataError if there is none.
    """
    pattern = re.compile(rf"(^|/){DATASETS[name].words.replace(' ', '.*')}\w*$")
    folders = [Path(data_dir)]
    for depth in range(4):
        for folder in folders:
            # Its parent's name and its own, as in cuhk03-np/labeled, without dashes, dots and such.
            names = Path(os.path.abspath(folder)).parts[-2:]
            named = pattern.search("/".join(re.sub(r"[\W_]", "", part.lower()) for part in names))
            if named and all((folder / images).is_dir() for images in FOLDERS.values()):
                return folder
        below = [path for folder in folders if depth < 3 for path in sorted(folder.glob("[!._]*"))]
        folders = [path for path in below if path.name not in FOLDERS.values() and path.is_dir()]
    raw = " (cuhk-03.mat is the raw release; use cuhk03-np)" * name.startswith("cuhk03")
    wanted = f"named like '{DATASETS[name].words}' with {', '.join(FOLDERS.values())}{raw}"
    raise DataError(f"{name}: found no folder {wanted} in {data_dir} or up to three folders below")


def read_split(folder: Path) -> Split:
    """The images of a folder, labelled by NAMES, except junk (identity -1). Raises DataError."""
    images = []  # (path, identity, camera)
    for file in sorted(os.listdir(folder)):
        if file.startswith(".") or not file.lower().endswith(EXTENSIONS):
            continue
        match = re.match(r"(-1|\d+)_c(\d+)[s_.]", file)
        if match is None:
            raise DataError(f"{folder / file}: the name must be {NAMES}")
        if match[1] != "-1":
            images.append((str(folder / file), int(match[1]), int(match[2])))
    if not images:
        hint = "; move them up out of subfolders" * any(path.is_dir() for path in folder.iterdir())
        raise DataError(f"{folder} holds no images ({', '.join(EXTENSIONS)}){hint}")
    paths, ids, cams = zip(*images, strict=True)
    return Split(list(paths), np.array(ids), np.array(cams))


def describe(name: str, splits: dict[str, Split]) -> str:
    """The counts of each split, the published ones if they differ, and the folder."""
    lines = [f"{name:<16}{'images':>8}{'identities':>12}{'cameras':>9}"]
    for split, (paths, ids, cams) in splits.items():
        people = np.unique(ids)
        if split == "gallery":  # identity 0 is a distractor there, unless it is searched for
            people = people[(people != 0) | np.isin(people, splits["query"].ids)]
        counts = len(paths), len(people)
        lines.append(f"  {split:<14}{counts[0]:>8,}{counts[1]:>12,}{len(np.unique(cams)):>9}")
        published = DATASETS[name].counts.get(split, counts)
        if counts != published:
            lines[-1] += "   published: {:,} and {:,}".format(*published)
    return "\n".join([*lines, f"from {Path(paths[0]).parents[1]}"])


# ---------- Images and batches --------------------------------------------------------------------


class ImageDataset(Dataset):
    """Image files, resized: [index] -> ((3, height, width) uint8 RGB, index)."""

    def __init__(self, paths: Sequence[str], height: int, width: int) -> None:
        self.paths, self.height, self.width = paths, height, width

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        size = [self.height, self.width]
        return TF.resize(read_image(self.paths[index]), size), index  # not in the paper: bilinear


def read_image(path: str | Path) -> Tensor:
    """An image file as (3, H, W) uint8 RGB. Raises DataError."""
    try:
        with Image.open(path) as image:  # a phone's photo may lie on its side
            return TF.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # what Pillow raises depends on where a file is damaged
        raise DataError(f"cannot read the image {path}: {error}; replace or remove it") from error


def normalize(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 on any device -> normalised floats, channels-last (Sec. 3.2)."""
    images = images.float().contiguous(memory_format=torch.channels_last)
    # Not in the paper: ImageNet's mean and deviation. Numbers, as a GPU would wait for tensors.
    for channel, mean, std in ((0, 0.485, 0.229), (1, 0.456, 0.224), (2, 0.406, 0.225)):
        images[:, channel].sub_(255 * mean).div_(255 * std)
    return images


def augment(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 on any device -> flipped, normalised, with cutout (Sec. 3.2)."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5  # half of them
    return cutout(normalize(torch.where(flipped, images.flip(3), images)))


def cutout(images: Tensor, probability: float = 0.5) -> Tensor:
    """Cutout: (B, C, H, W) normalised floats, in place (Sec. 3.2).

    Not in the paper: probability 0.5, one 64 x 64 square inside the image, 0 after normalisation;
    at sizes other than 384 x 128, the same share of the area, 1/12.
    """
    batch, _, height, width = images.shape
    side = min(round(math.sqrt(height * width / 12)), height, width)

    def random_interval(size: int) -> Tensor:  # (B, size) bool
        start = torch.randint(size - side + 1, (batch, 1), device=images.device)
        position = torch.arange(size, device=images.device)
        return (start <= position) & (position < start + side)

    square = random_interval(height)[:, None, :, None] & random_interval(width)[:, None, None]
    chosen = torch.rand(batch, 1, 1, 1, device=images.device) < probability
    return images.masked_fill_(square & chosen, 0)  # (B, 1, H, W)


class IdentitySampler:
    """A batch_sampler of P identities x K images (Sec. 3.2).

    labels (N,) identities of the images; yields lists of indices, an identity's images side by side.
    Not in the paper: an epoch is identities // P steps, each identity at most once; its images
    are drawn with replacement if it has fewer than K. Batches depend only on seed and epoch: call
    set_epoch before each epoch. Process `rank` of `world_size` takes P / world_size identities.

    Raises DataError if there are fewer identities than P, or world_size does not divide P.
    """

    def __init__(
        self, labels: Tensor, ids_per_batch=32, images_per_id=4, seed=0, rank=0, world_size=1
    ) -> None:
        labels = np.asarray(labels)
        self.images_of_id = [np.flatnonzero(labels == identity) for identity in np.unique(labels)]
        if len(self.images_of_id) < ids_per_batch:
            raise DataError(f"{len(self.images_of_id)} identities, but a batch needs {ids_per_batch}")
        if ids_per_batch % world_size:
            raise DataError(f"{ids_per_batch} identities are not divisible by {world_size} processes")
        self.ids_per_batch, self.images_per_id, self.seed = ids_per_batch, images_per_id, seed
        self.rank, self.ids_per_process = rank, ids_per_batch // world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> "IdentitySampler":
        self.epoch = epoch
        return self

    def __len__(self) -> int:
        return len(self.images_of_id) // self.ids_per_batch

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.images_of_id))
        drawn = []  # for all identities, so that all processes use the same random numbers
        for images in (self.images_of_id[i] for i in order):
            drawn.append(rng.choice(images, self.images_per_id, replace=len(images) < self.images_per_id))
        for batch in range(len(self)):
            start = batch * self.ids_per_batch + self.rank * self.ids_per_process
            yield np.concatenate(drawn[start : start + self.ids_per_process]).tolist()


# ---------- The toy: people drawn with Pillow, the same each time ---------------------------------

SKINS, HAIRS = "#f0c8a8 #c98f68 #8a5a3c #5a3a2a".split(), "#1c1815 #4a3122 #a8793f #9a9a96".split()
COLOURS = "#b3282d #d98032 #d9c24a #3f7d4a #3b8f9c #2f4f96 #6d4a8c #c98aa2 #e6e3dc #8a8d90 #26262b".split()


def draw_toy(folder: Path) -> None:
    """64 people to train on, 3 images from each of 4 cameras; 50 others, 1 query and 1 image from each."""
    people = {"train": range(1, 65), "query": range(65, 115), "gallery": range(65, 115)}
    numbers = {"train": (0, 1, 2), "query": (0,), "gallery": (1,)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # the toy is whole or not there
        for split, name in FOLDERS.items():
            images = Path(scratch, "toy", name)
            images.mkdir(parents=True)
            for person, camera, i in product(people[split], (1, 2, 3, 4), numbers[split]):
                draw_pedestrian(person, camera, i).save(images / f"{person:04d}_c{camera}_{i}.png")
        with suppress(OSError):  # another process was faster
            Path(scratch, "toy").rename(folder)


def draw_pedestrian(person: int, camera: int, number: int) -> Image.Image:
    """A street camera's crop, 64 x 128 pixels: the same numbers give the same picture."""
    who, where, when = map(np.random.default_rng, ((1, person), (2, camera), (3, person, camera, number)))
    skin, hair, (top, second, bottom, bag) = who.choice(SKINS), who.choice(HAIRS), who.choice(COLOURS, 4)
    pattern, carries, long_hair, shorts = who.integers((4, 3, 2, 2))
    width, height = who.uniform(22, 32), who.uniform(190, 225)
    x, feet, stride = when.normal(64, 6), when.normal(244, 4), when.uniform(-0.5, 0.5)

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:  # half-widths, heights
        return [(x + dx * width, feet - dy * height) for dx, dy in points]

    canvas = Image.new("RGB", (128, 256), tuple(where.integers(100, 180, 3).tolist()))  # the wall
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 160, 128, 256), tuple(where.integers(100, 180, 3).tolist()))
    draw.rectangle((when.integers(128), 0, 200, when.integers(80, 200)), when.choice(COLOURS))
    for side in (-1, 1):  # legs and arms
        leg = at((side * 0.4, 0.5), (side * (0.4 + stride / 2), 0.27), (side * (0.4 + stride), 0))
        draw.line(leg, skin, 14)
        draw.line(leg[:2] if shorts else leg, bottom, 18)
        draw.line(at((side * 0.8, 0.78), (side * (1.1 + stride / 2), 0.48)), top, 12)
        if long_hair:
            draw.line(at((side * 0.4, 0.94), (side * 0.4, 0.78)), hair, 8)
    torso = Image.new("1", canvas.size)
    ImageDraw.Draw(torso).rounded_rectangle(at((-0.85, 0.83), (0.85, 0.47)), 10, 1)
    row, column = np.arange(256)[:, None] // 10, (np.arange(128) - int(x)) // 10
    worn = (row * (pattern & 1) + column * (pattern >> 1)) % 2 == 1  # plain, stripes, bars, checks
    canvas.paste(top, mask=torso)
    canvas.paste(second, mask=Image.fromarray(worn & np.asarray(torso)))
    if carries == 1:
        draw.line(at((0.9, 0.48), (1.8, 0.48)), bag, 36)  # a bag in the hand
    if carries == 2:
        draw.line(at((-0.8, 0.83), (0.8, 0.5)), bag, 8)  # a strap
    draw.ellipse(at((-0.45, 1), (0.45, 0.84)), skin)
    draw.pieslice(at((-0.5, 1.02), (0.5, 0.84)), 180, 360, hair)
    canvas = canvas.filter(ImageFilter.GaussianBlur(where.uniform(1, 2))).resize((64, 128))
    light = where.uniform(0.7, 1.3, 3) * when.uniform(0.85, 1.15)
    pixels = np.asarray(canvas) * light + when.normal(0, 5, (128, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
