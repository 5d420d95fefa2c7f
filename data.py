# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of SONA-Net in plain PyTorch
"""Data of SONA-Net (Xia et al., ICCV 2019): re-ID sets, the identity sampler, augmentation, a toy to draw.

Usage:
    splits = load_dataset("market1501", "datasets")     # {"train": Split, "query": Split, "gallery": Split}
    train = splits["train"]
    sampler = IdentitySampler(train.labels, ids_per_batch=32, images_per_id=4)
    loader = torch.utils.data.DataLoader(ImageDataset(train.paths, 384, 128), batch_sampler=sampler)
    for epoch in range(400):
        sampler.set_epoch(epoch)                        # without it all epochs have the same batches
        for images, indices in loader:                  # (128, 3, 384, 128) uint8, (128,)
            batch, labels = augment(images), train.labels[indices]
"""

import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Source(NamedTuple):
    """A data set in the Market-1501 layout."""

    folders: tuple[str, ...]  # under the data folder, any one of them
    counts: dict[str, tuple[int, int]] = {}  # the published (images, identities) of each split (Table 1)


DATASETS = {
    "toy": Source(("toy",), {"train": (768, 64), "query": (200, 50), "gallery": (250, 50)}),
    "market1501": Source(  # the gallery of Table 1, 19,732, less its 3,819 junk images (Sec. 3.1)
        ("market1501", "Market-1501-v15.09.15"),
        {"train": (12936, 751), "query": (3368, 750), "gallery": (15913, 750)},
    ),
    "dukemtmc": Source(
        ("dukemtmc-reid", "DukeMTMC-reID"),
        {"train": (16522, 702), "query": (2228, 702), "gallery": (17661, 1110)},
    ),
    "cuhk03": Source(
        ("cuhk03-np/labeled", "CUHK03-NP/labeled"),
        {"train": (7368, 767), "query": (1400, 700), "gallery": (5328, 700)},
    ),
    "cuhk03-detected": Source(
        ("cuhk03-np/detected", "CUHK03-NP/detected"),
        {"train": (7365, 767), "query": (1400, 700), "gallery": (5332, 700)},
    ),
}


class DataError(ValueError):
    """Data that is missing or cannot be used; the message is one line for the user."""


# ---------------------------------------------------------------------------------------------------
# Data sets in the Market-1501 layout


class Split(NamedTuple):
    """Images with their labels, as of one folder."""

    paths: list[str]
    ids: np.ndarray  # (N,) identities as in the file names; 0 is a distractor, -1 unknown
    cams: np.ndarray  # (N,) cameras

    @property
    def labels(self) -> Tensor:
        """(N,) the identities renumbered from 0, for a classifier."""
        return torch.from_numpy(np.unique(self.ids, return_inverse=True)[1])

    @property
    def num_ids(self) -> int:
        """The number of identities, distractors aside."""
        return len(np.unique(self.ids[self.ids > 0]))


def load_dataset(name: str, data_dir: str | Path) -> dict[str, Split]:
    """The train, query and gallery split of a set of DATASETS that lies under data_dir.

    The toy is drawn on first use. Raises DataError where the set is unknown, missing, empty, nested in a
    further folder, or holds an image whose name does not parse.
    """
    if name not in DATASETS:
        raise DataError(f"no data set is named {name}; choose from {', '.join(DATASETS)}")
    candidates = [Path(data_dir, folder) for folder in DATASETS[name].folders]
    if name == "toy" and not candidates[0].exists():
        draw_toy(candidates[0])
    root = next((folder for folder in candidates if folder.is_dir()), None)
    if root is None:
        raise DataError(
            f"{name} is not there: no folder {' or '.join(map(str, candidates))}; README.md says where to get it"
        )
    splits = {split: read_split(root / folder) for split, folder in FOLDERS.items()}
    query, gallery = splits["query"], splits["gallery"]
    cameras_of = {identity: set(gallery.cams[gallery.ids == identity].tolist()) for identity in np.unique(query.ids)}
    if not any(cameras_of[identity] - {cam} for identity, cam in zip(query.ids, query.cams, strict=True)):
        raise DataError(f"{root}: no query has a true match under another camera; are the file names right?")
    return splits


def read_split(folder: Path) -> Split:
    """The images of a folder by their names, <identity>_c<camera>... as in 0002_c1s1_000451_03.jpg.

    Junk (identity -1) and files that are no images are passed over. Raises DataError.
    """
    if not folder.is_dir():
        nested = next(folder.parent.glob(f"*/{folder.name}"), None)
        hint = f"it is in {nested.parent}: move that folder's content up" if nested else "unpack the archive again"
        raise DataError(f"{folder} is missing; {hint}")
    paths, ids, cams = [], [], []
    for file in sorted(os.listdir(folder)):
        if file.startswith(".") or not file.lower().endswith(EXTENSIONS):
            continue
        match = re.match(r"(-1|\d+)_c(\d+)[s_.]", file)
        if match is None:
            raise DataError(
                f"{folder / file}: the name does not say who and where; expected <identity>_c<camera>_..., as in "
                "0002_c1s1_000451_03.jpg"
            )
        if match[1] != "-1":
            paths.append(str(folder / file))
            ids.append(int(match[1]))
            cams.append(int(match[2]))
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(EXTENSIONS)}); unpack the archive again")
    return Split(paths, np.array(ids), np.array(cams))


def describe(name: str, splits: dict[str, Split]) -> str:
    """The counts of each split beside the published ones, with a note where they differ."""
    lines = [f"{name:<16}{'images':>8}{'identities':>12}{'cameras':>9}"]
    for split, found in splits.items():
        size = len(found.paths), found.num_ids
        published = DATASETS[name].counts.get(split, size)
        differs = "" if size == published else f"   published: {published[0]:,} of {published[1]:,}"
        lines.append(f"  {split:<14}{size[0]:>8,}{size[1]:>12,}{len(np.unique(found.cams)):>9}{differs}")
    if any("published" in line for line in lines):
        lines.append("note: these are not the published counts; figures do not compare with others'")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------
# Images and batches


class ImageDataset(Dataset):
    """Image files, resized: [index] -> ((3, height, width) uint8 RGB, index)."""

    def __init__(self, paths: Sequence[str], height: int, width: int) -> None:
        self.paths, self.height, self.width = paths, height, width

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return TF.resize(read_image(self.paths[index]), [self.height, self.width]), index  # not in the paper: bilinear


def read_image(path: str | Path) -> Tensor:
    """An image file as (3, H, W) uint8 RGB, whatever its own mode. Raises DataError naming the file."""
    try:
        with Image.open(path) as image:
            with suppress(Exception):  # of broken EXIF data; a broken picture fails below, too
                ImageOps.exif_transpose(image, in_place=True)  # a phone's photo may lie on its side
            if image.mode.startswith("I"):  # 16-bit grey, which convert would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode == "P":  # with transparency Pillow wants this step
                image = image.convert("RGBA")
            return TF.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # what Pillow raises depends on where a file is damaged
        raise DataError(f"cannot read the image {path}: {error}; replace or remove it") from error


def normalize(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 on any device -> normalised floats, channels-last (Sec. 3.2)."""
    mean, std = imagenet_statistics(images.device)
    return images.float().sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)


@cache  # copying it for each batch would make a GPU wait
def imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of RGB in [0, 255], each (3, 1, 1). Not in the paper: ImageNet's."""
    mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]) * 255
    return mean[:, None, None].to(device), std[:, None, None].to(device)


def augment(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 on any device -> the training transform: flip, normalise, cutout (Sec. 3.2).

    On whole batches, where the network is: workers pass on a quarter of the bytes and need no random state.
    """
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5  # not in the paper: half of the images
    return cutout(normalize(torch.where(flipped, images.flip(3), images)))


def cutout(images: Tensor, probability: float = 0.5) -> Tensor:
    """Cutout: (B, C, H, W) normalised floats, in place (Sec. 3.2).

    Not in the paper: probability 0.5, one 64 x 64 square inside the image, 0 after normalisation; at other
    sizes than 384 x 128 the same share of the area, 1/12. (RandomErasing works image by image, and a GPU
    would wait each time.)
    """
    batch, _, height, width = images.shape
    side = min(round(math.sqrt(height * width / 12)), height, width)

    def random_interval(size: int) -> Tensor:  # (B, size) bool
        start = torch.randint(size - side + 1, (batch, 1), device=images.device)
        position = torch.arange(size, device=images.device)
        return (start <= position) & (position < start + side)

    square = random_interval(height)[:, None, :, None] & random_interval(width)[:, None, None]  # (B, 1, H, W)
    chosen = torch.rand(batch, 1, 1, 1, device=images.device) < probability
    return images.masked_fill_(square & chosen, 0)


class IdentitySampler:
    """Batches of P identities x K images (Sec. 3.2): a batch_sampler.

    Not in the paper: an epoch is identities // P steps, each identity at most once.

    labels (N,) identities of the images; yields lists of indices, the K images of an identity side by
    side, drawn with replacement if it has fewer. An epoch is a function of seed and epoch alone: call
    set_epoch before each. Of each global batch, process `rank` of `world_size` takes its P / world_size
    identities. The identities left over when P does not divide their number sit out an epoch.

    Raises DataError where there are fewer identities than P, or world_size does not divide P.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray | Tensor,
        ids_per_batch: int = 32,
        images_per_id: int = 4,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        labels = np.asarray(labels)
        self.images_of_id = [np.flatnonzero(labels == identity) for identity in np.unique(labels)]
        if len(self.images_of_id) < ids_per_batch:
            raise DataError(
                f"the training set has {len(self.images_of_id)} identities, a batch takes {ids_per_batch}; take fewer"
            )
        if ids_per_batch % world_size:
            raise DataError(f"{ids_per_batch} identities a batch cannot be shared among {world_size} processes alike")
        self.ids_per_batch, self.images_per_id, self.seed = ids_per_batch, images_per_id, seed
        self.rank, self.share = rank, ids_per_batch // world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images_of_id) // self.ids_per_batch

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.images_of_id))
        # Drawn for all identities, so that all processes use the same random numbers.
        images = [
            rng.choice(self.images_of_id[i], self.images_per_id, replace=len(self.images_of_id[i]) < self.images_per_id)
            for i in order
        ]
        for batch in range(len(self)):
            start = batch * self.ids_per_batch + self.rank * self.share
            yield np.concatenate(images[start : start + self.share]).tolist()


# ---------------------------------------------------------------------------------------------------
# The toy: pedestrians drawn with Pillow, in the Market-1501 layout, the same bytes every time

COLOURS = "#b3282d #d98032 #d9c24a #3f7d4a #3b8f9c #2f4f96 #6d4a8c #c98aa2 #e6e3dc #8a8d90 #26262b #6b4a33".split()
SKINS, HAIRS = "#f0c8a8 #c98f68 #8a5a3c #5a3a2a".split(), "#1c1815 #4a3122 #a8793f #9a9a96".split()


def draw_toy(folder: Path) -> None:
    """64 training identities of 4 cameras x 3 images; 50 others of 4 x 2, and 50 distractors (identity 0).

    Drawn in a folder of its own and moved, so that it is whole or not there. Raises DataError.
    """
    cameras = range(1, 5)
    images = [("train", person, person, camera, i) for camera in cameras for person in range(1, 65) for i in range(3)]
    for camera in cameras:
        for person in range(65, 115):
            images += [("query", person, person, camera, 0), ("gallery", person, person, camera, 1)]
    images += [("gallery", 0, person, 1 + person % 4, 0) for person in range(115, 165)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="toy-", dir=folder.parent) as scratch:
            toy = Path(scratch, "toy")
            for split in FOLDERS.values():
                (toy / split).mkdir(parents=True)
            for split, identity, person, camera, i in images:
                name = f"{identity:04d}_c{camera}_{person:04d}_{i}.png"
                draw_pedestrian(person, camera, i).save(toy / FOLDERS[split] / name)
            with suppress(OSError):  # another process was faster
                toy.rename(folder)
    except OSError as error:
        raise DataError(f"cannot draw the toy in {folder.parent}: {error.strerror}; choose another folder") from error


def draw_pedestrian(person: int, camera: int, image: int) -> Image.Image:
    """A street camera's crop, 64 x 128 pixels: the same person, camera and image number, the same picture."""
    who, where, when = (np.random.default_rng(key) for key in ((9, person), (18, camera), (7, person, camera, image)))

    # Who: build, hair, garments with pattern, bag, shoes
    build, tall = who.uniform(0.85, 1.25), who.uniform(0.9, 1.06)
    skin, hair = who.choice(SKINS), who.choice(HAIRS)
    top, second, bottom, shoe, bag_colour = who.choice(COLOURS, 5)
    long_hair, long_sleeves, shorts = who.random(3) < 0.5
    pattern, bag = who.integers(5), who.choice(["none", "backpack", "shoulder", "hand"])

    # Where: viewpoint, background, light
    zoom, blur, side_view = where.uniform(0.88, 1.04), where.uniform(0.3, 1.3), camera % 3 == 0
    wall, floor = (where.uniform(70, 190) + where.uniform(-14, 14, 3) for _ in range(2))
    horizon, cast, gain = where.uniform(75, 155), where.uniform(0.72, 1.28, 3), where.uniform(0.75, 1.25)

    # When: pose and place, in pixels of a canvas of twice the size
    size = 232 * zoom * tall * when.uniform(0.95, 1.04)
    x, feet, swing = when.normal(64, 6), when.normal(248, 3), when.uniform(-1, 1)
    back = when.random() < (0.8 if camera % 3 == 2 else 0.2)
    width = size * 0.13 * build * (0.75 if side_view else 1)

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:  # in half-widths from the axis, in heights
        return [(x + dx * width, feet - height * size) for dx, height in points]

    def shade(colour: np.ndarray, brightness: float = 1) -> tuple[int, ...]:
        return tuple((colour * brightness).astype(int).tolist())

    canvas = Image.new("RGB", (128, 256), shade(wall))
    draw = ImageDraw.Draw(canvas)
    for left in range(int(when.integers(-20, 0)), 128, 34):  # shop fronts
        draw.rectangle(
            (left, horizon * when.uniform(0.1, 0.5), left + 22, horizon), shade(wall, when.uniform(0.7, 1.2))
        )
    draw.rectangle((0, horizon, 128, 256), shade(floor))
    draw.ellipse((x - 1.8 * width, feet - 9, x + 2.2 * width, feet + 9), shade(floor, 0.6))

    limb, stride = int(width * 0.62), swing * (0.9 if side_view else 0.35)
    for side in (-1, 1):  # legs
        leg = at((side * 0.4, 0.5), (side * (0.45 + stride / 2), 0.27), (side * (0.42 + stride), 0.04))
        draw.line(leg, skin, int(limb * 0.75), "curve")
        draw.line(leg[:2] if shorts else leg, bottom, limb, "curve")
        draw.ellipse((leg[2][0] - limb * 0.75, leg[2][1] - 5, leg[2][0] + limb * 0.75, leg[2][1] + 9), shoe)

    if bag == "backpack":
        draw.rounded_rectangle(at((-1.15, 0.8), (1.15, 0.56)), 8, bag_colour)
    torso = Image.new("1", canvas.size)
    outline = at((-0.6, 0.83), (0.6, 0.83), (1, 0.78), (0.8, 0.47), (-0.8, 0.47), (-1, 0.78))
    ImageDraw.Draw(torso).polygon(outline, 1)
    step = size * 0.055
    row, column = (np.arange(256)[:, None] - feet) // step, (np.arange(128) - x) // step
    patterns = [False, row % 2 == 0, column % 2 == 0, (row + column) % 2 == 0, row < -12]
    worn = np.broadcast_to(patterns[pattern], (256, 128))  # plain, stripes, bars, checks or halves
    canvas.paste(top, mask=torso)
    canvas.paste(second, mask=Image.fromarray(worn & np.asarray(torso)))
    for side in (-1, 1):
        arm = at((side * 0.9, 0.79), (side * 1.25, 0.63), (side * (1.2 + 0.4 * swing), 0.47))
        draw.line(arm, skin, int(limb * 0.5), "curve")
        draw.line(arm if long_sleeves else arm[:2], top, int(limb * 0.62), "curve")

    draw.rectangle(at((-0.22, 0.87), (0.22, 0.81)), skin)
    (left, crown), (right, chin) = at((-0.45, 0.995), (0.45, 0.845))
    if long_hair:
        draw.rounded_rectangle((left - 4, crown - 3, right + 4, chin + 14), 9, hair)
    draw.ellipse((left, crown, right, chin), hair if back else skin)
    draw.chord((left - 2, crown - 3, right + 2, chin), 175, 365, hair)
    if bag == "backpack" and back:
        draw.rounded_rectangle(at((-0.75, 0.81), (0.75, 0.55)), 8, bag_colour)
    elif bag == "shoulder":
        draw.line(at((-0.7, 0.82), (0.9, 0.52)), bag_colour, 5)
        draw.rectangle(at((0.6, 0.55), (1.5, 0.44)), bag_colour)
    elif bag == "hand":
        draw.rectangle(at((1.0, 0.46), (1.75, 0.33)), bag_colour)

    if when.random() < 0.35:  # something in front: a post, a car, a passer-by's shoulder
        edge = int(when.integers(128))
        boxes = [(edge, 0, edge + 12, 256), (0, 186 + edge // 2, 128, 256), (edge, 90, edge + 36, 256)]
        draw.rounded_rectangle(boxes[camera % 3], 6, shade(when.uniform(40, 170) + when.uniform(-30, 30, 3)))

    canvas = canvas.filter(ImageFilter.GaussianBlur(blur * 2)).resize((64, 128), Image.Resampling.BOX)
    pixels = np.asarray(canvas) * cast * gain * when.uniform(0.85, 1.15) + when.normal(0, 5, (128, 64, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
