# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""The data of SONA-Net (Xia et al., ICCV 2019): data sets, sampler, augmentation and a drawn toy.

Usage:
    train = load_dataset("market1501", "datasets")["train"]     # a Split; also "query", "gallery"
    dataset = ImageDataset(train.paths, train.labels, 384, 128)
    sampler = IdentitySampler(train.labels, ids_per_batch=32, images_per_id=4)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler)
    for epoch in range(400):
        sampler.set_epoch(epoch)            # without it, every epoch repeats the same batches
        for images, labels in loader:       # (128, 3, 384, 128) uint8, (128,)
            images = augment(images)        # floats, for SONANet
"""

import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from glob import glob
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.utils.data import Dataset

# ---------- Data sets in the Market-1501 layout ---------------------------------------------------

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


class Source(NamedTuple):
    """Where a data set is, and what should be in it."""

    folder: str  # in --data-dir
    counts: dict[str, tuple[int, int]] = {}  # expected (images, identities): Table 1, Sec. 3.1


DATASETS = {
    "toy": Source(
        "toy",
        {"train": (768, 64), "query": (200, 50), "gallery": (200, 50)},
    ),
    # The gallery of Table 1, 19,732, less its 3,819 junk images (Sec. 3.1).
    "market1501": Source(
        "Market-1501-v15.09.15",
        {"train": (12936, 751), "query": (3368, 750), "gallery": (15913, 750)},
    ),
    "dukemtmc": Source(
        "DukeMTMC-reID",
        {"train": (16522, 702), "query": (2228, 702), "gallery": (17661, 1110)},
    ),
    "cuhk03": Source(
        "cuhk03-np/labeled",
        {"train": (7368, 767), "query": (1400, 700), "gallery": (5328, 700)},
    ),
    "cuhk03-detected": Source(
        "cuhk03-np/detected",
        {"train": (7365, 767), "query": (1400, 700), "gallery": (5332, 700)},
    ),
}


class Split(NamedTuple):
    """The images of a folder, with what their names say."""

    paths: list[str]
    ids: np.ndarray  # (N,) identities; in a gallery 0 is a distractor
    cams: np.ndarray  # (N,) cameras

    @property
    def labels(self) -> np.ndarray:
        """(N,) the identities renumbered from 0, for a classifier."""
        return np.unique(self.ids, return_inverse=True)[1]


def load_dataset(name: str, data_dir: str | Path) -> dict[str, Split]:
    """The splits "train", "query" and "gallery" of a set in DATASETS; draws the toy on first use.

    Raises FileNotFoundError if one of its FOLDERS is not there, or has no images, and ValueError if
    the name of an image does not say its identity and camera.
    """
    folder = Path(data_dir, DATASETS[name].folder)
    if name == "toy" and not folder.exists():
        draw_toy(folder)
    return {split: read_split(folder / subfolder) for split, subfolder in FOLDERS.items()}


def read_split(folder: Path) -> Split:
    """The images in a folder, without junk (identity -1). Raises what load_dataset raises."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: put or link the data set there")
    paths = []
    ids_and_cams = []
    for name in sorted(glob("*", root_dir=folder)):  # without hidden files
        if not name.lower().endswith((".jpg", ".jpeg", ".png")):
            continue
        match = re.match(r"(-1|\d+)_c(\d+)", name)
        if match is None:
            example = "0002_c1s1_000451_03.jpg is identity 2 from camera 1"
            raise ValueError(f"{folder / name}: the name says no identity and camera; {example}")
        identity, camera = map(int, match.groups())
        if identity != -1:
            paths.append(str(folder / name))
            ids_and_cams.append((identity, camera))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no .jpg, .jpeg or .png of a person")
    ids, cams = np.array(ids_and_cams).T
    return Split(paths, ids, cams)


def describe(name: str, splits: dict[str, Split]) -> str:
    """A table of the splits' counts, with the published ones where they differ, and the folder."""
    lines = [f"{name:<16}{'images':>8}{'identities':>12}{'cameras':>9}"]
    for split, (paths, ids, cams) in splits.items():
        identities = set(ids.tolist())
        if split == "gallery":
            identities.discard(0)  # distractors
        counts = len(paths), len(identities)
        line = f"  {split:<14}{counts[0]:>8,}{counts[1]:>12,}{len(set(cams.tolist())):>9}"
        published = DATASETS[name].counts.get(split)
        if published is not None and counts != published:
            line += "   published: {:,} and {:,}".format(*published)
        lines.append(line)
    folder = Path(splits["train"].paths[0]).parents[1]
    return "\n".join([*lines, f"from {folder}"])


# ---------- Images and batches --------------------------------------------------------------------


class ImageDataset(Dataset):
    """Image files, resized, with a label each: [index] -> ((3, height, width) uint8 RGB, label)."""

    def __init__(
        self, paths: Sequence[str | Path], labels: Sequence[int], height: int, width: int
    ) -> None:
        self.paths = list(paths)
        self.labels = list(labels)
        self.size = [height, width]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.paths[index])
        return TF.resize(image, self.size), self.labels[index]  # bilinear, not in the paper


def read_image(path: str | Path) -> Tensor:
    """An image file as (3, H, W) uint8 RGB. Raises OSError if it cannot be read."""
    try:
        # Only these formats: Pillow would hand some others to external programs.
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return TF.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # Pillow raises even SyntaxError, for a broken PNG
        raise OSError(f"cannot read the image {path}: {error}; replace or remove it") from error


def augment(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 on any device -> flipped, normalised, with cutout (Sec. 3.2)."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return cutout(normalize(torch.where(flipped, images.flip(3), images)))


def normalize(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 on any device -> normalised floats (Sec. 3.2).

    Not in the paper: ImageNet's mean and standard deviation.
    """
    # Plain numbers: copying a tensor of means to the GPU would make the CPU wait in each pass.
    red, green, blue = images.float().unbind(1)  # (B, H, W) each
    red = (red - 255 * 0.485) / (255 * 0.229)
    green = (green - 255 * 0.456) / (255 * 0.224)
    blue = (blue - 255 * 0.406) / (255 * 0.225)
    return torch.stack([red, green, blue], 1)


def cutout(images: Tensor, probability: float = 0.5) -> Tensor:
    """Cutout: (B, C, H, W) normalised floats -> the same with a square of zeros (Sec. 3.2).

    Not in the paper: probability 0.5, one 64 x 64 square inside the image, 0 after normalisation;
    at sizes other than 384 x 128, about the same share of the area, 1/12.
    """
    batch, _, height, width = images.shape
    side = round(math.sqrt(height * width / 12))

    def random_interval(size: int) -> Tensor:  # (B, size) bool, True at `side` positions in a row
        start = torch.randint(size - side + 1, (batch, 1), device=images.device)
        position = torch.arange(size, device=images.device)
        return (start <= position) & (position < start + side)

    rows = random_interval(height)[:, None, :, None]  # (B, 1, H, 1)
    columns = random_interval(width)[:, None, None, :]  # (B, 1, 1, W)
    chosen = torch.rand(batch, 1, 1, 1, device=images.device) < probability
    return images.masked_fill(rows & columns & chosen, 0)


class IdentitySampler:
    """A batch_sampler of P = ids_per_batch identities x K = images_per_id images (Sec. 3.2).

    labels (N,) identities of the images; yields lists of indices in which an identity's images are
    neighbours. Not in the paper: an epoch is identities // P steps, each identity at most once; its
    images are drawn with replacement if it has fewer than K. Batches depend only on seed and epoch:
    call set_epoch before each epoch. Process `rank` of `world_size` takes P / world_size
    identities.

    Raises ValueError if there are fewer identities than P, or world_size does not divide P.
    """

    def __init__(
        self,
        labels: Sequence[int],
        ids_per_batch: int = 32,
        images_per_id: int = 4,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        labels = np.asarray(labels)
        self.images_of_id = [np.flatnonzero(labels == identity) for identity in np.unique(labels)]
        identities = len(self.images_of_id)
        if identities < ids_per_batch:
            raise ValueError(f"{identities} identities, but a batch needs {ids_per_batch}")
        if ids_per_batch % world_size:
            raise ValueError(
                f"{ids_per_batch} identities are not divisible by {world_size} processes"
            )
        self.ids_per_batch = ids_per_batch
        self.images_per_id = images_per_id
        self.seed = seed
        self.rank = rank
        self.ids_per_process = ids_per_batch // world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch, counted from 0, whose batches are drawn next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images_of_id) // self.ids_per_batch

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        drawn = []  # for all identities, so that all processes use the same random numbers
        for identity in rng.permutation(len(self.images_of_id)):
            images = self.images_of_id[identity]
            too_few = len(images) < self.images_per_id
            drawn.append(rng.choice(images, self.images_per_id, replace=too_few))
        for step in range(len(self)):
            start = step * self.ids_per_batch + self.rank * self.ids_per_process
            yield np.concatenate(drawn[start : start + self.ids_per_process]).tolist()


# ---------- The toy: people drawn with Pillow, the same each time ---------------------------------

SKINS = "#f0c8a8 #c98f68 #8a5a3c #5a3a2a".split()
HAIRS = "#1c1815 #4a3122 #a8793f #9a9a96".split()
CLOTHES = (
    "#b3282d #d98032 #d9c24a #3f7d4a #3b8f9c #2f4f96 #6d4a8c #c98aa2 #e6e3dc #8a8d90 #26262b"
).split()


def draw_toy(folder: Path) -> None:
    """64 people to train on, 3 images from each of 4 cameras; 50 others to find.

    Each camera has 1 query image and 1 gallery image of each of those.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for split, people, numbers in (
            ("train", range(1, 65), (0, 1, 2)),
            ("query", range(65, 115), (0,)),
            ("gallery", range(65, 115), (1,)),
        ):
            target = Path(scratch, "toy", FOLDERS[split])
            target.mkdir(parents=True)
            for person, camera, i in product(people, (1, 2, 3, 4), numbers):
                draw_pedestrian(person, camera, i).save(target / f"{person:04d}_c{camera}_{i}.png")
        with suppress(OSError):  # another process was first; its toy is whole, renamed like this
            Path(scratch, "toy").rename(folder)


def draw_pedestrian(person: int, camera: int, number: int) -> Image.Image:
    """A person as a street camera would crop it, 128 x 64 pixels.

    The same arguments give the same picture.
    """
    who = np.random.default_rng((1, person))
    where = np.random.default_rng((2, camera))
    when = np.random.default_rng((3, person, camera, number))

    skin = who.choice(SKINS)
    hair = who.choice(HAIRS)
    top, second, bottom, bag = who.choice(CLOTHES, 4)
    pattern, carries, long_hair, shorts = who.integers((4, 3, 2, 2))
    half_width = who.uniform(22, 32)
    height = who.uniform(190, 225)
    x = when.normal(64, 6)
    feet = when.normal(244, 4)
    stride = when.uniform(-0.5, 0.5)

    def at(*points: tuple[float, float]) -> list:  # half-widths, heights -> pixels
        return [(x + dx * half_width, feet - dy * height) for dx, dy in points]

    # The street, and something that stands there.
    wall, ground = where.integers(100, 180, (2, 3)).tolist()
    canvas = Image.new("RGB", (128, 256), tuple(wall))
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 160, 128, 256), tuple(ground))
    draw.rectangle((when.integers(128), 0, 200, when.integers(80, 200)), when.choice(CLOTHES))

    for side in (-1, 1):  # legs, arms and long hair
        hip_knee_foot = at(
            (side * 0.4, 0.5), (side * (0.4 + stride / 2), 0.27), (side * (0.4 + stride), 0)
        )
        draw.line(hip_knee_foot, skin, 14)
        draw.line(hip_knee_foot[:2] if shorts else hip_knee_foot, bottom, 18)
        draw.line(at((side * 0.8, 0.78), (side * (1.1 + stride / 2), 0.48)), top, 12)
        if long_hair:
            draw.line(at((side * 0.4, 0.94), (side * 0.4, 0.78)), hair, 8)

    torso = Image.new("1", canvas.size)
    ImageDraw.Draw(torso).rounded_rectangle(at((-0.85, 0.83), (0.85, 0.47)), 10, 1)
    row = np.arange(256)[:, None] // 10
    column = (np.arange(128) - int(x)) // 10
    hoops = pattern in (1, 3)
    stripes = pattern in (2, 3)
    in_second = (hoops * row + stripes * column) % 2 == 1  # both: checks
    canvas.paste(top, mask=torso)
    canvas.paste(second, mask=Image.fromarray(in_second & np.asarray(torso)))
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
