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
import os
import re
import sys
import tempfile
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.data import Dataset

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
NAMES = "<identity>_c<camera>_..., e.g. 0002_c1s1_000451_03.jpg"
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # what Pillow may take a file for


class Source(NamedTuple):
    """A data set in the Market-1501 layout."""

    words: str  # in its folder's name: "market 1501" for Market-1501-v15.09.15
    counts: dict[str, tuple[int, int]] = {}  # published (images, identities): Table 1, Sec. 3.1


DATASETS = {
    "toy": Source(
        "toy",
        {"train": (768, 64), "query": (200, 50), "gallery": (200, 50)},
    ),
    # The gallery of Table 1, 19,732, less its 3,819 junk images (Sec. 3.1).
    "market1501": Source(
        "market 1501",
        {"train": (12936, 751), "query": (3368, 750), "gallery": (15913, 750)},
    ),
    "dukemtmc": Source(
        "duke mtmc",
        {"train": (16522, 702), "query": (2228, 702), "gallery": (17661, 1110)},
    ),
    "cuhk03": Source(
        "cuhk label",
        {"train": (7368, 767), "query": (1400, 700), "gallery": (5328, 700)},
    ),
    "cuhk03-detected": Source(
        "cuhk detect",
        {"train": (7365, 767), "query": (1400, 700), "gallery": (5332, 700)},
    ),
}


# ---------- Errors and files ----------------------------------------------------------------------


class DataError(ValueError):
    """Data is missing or unusable. The message is one line, for the user."""

    def __str__(self):  # without the traceback that a DataLoader's worker puts before it
        return super().__str__().rsplit("DataError: ", 1)[-1].strip()


def run_program(main):
    """Calls main; a DataError, or an OSError that names its file, ends it with one line."""
    with suppress(AttributeError):  # a notebook's output has no reconfigure
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that a terminal cannot show
    try:
        main()
    except (DataError, OSError) as error:
        # A DataError has no filename; an OSError whose filename is None is not about data.
        if getattr(error, "filename", True) is None:
            raise
        sys.exit(f"error: {error}")


def load_tensors(path, *keys):
    """A checkpoint or file of weights, on the CPU; nothing in it is executed.

    Raises OSError if it cannot be opened, DataError if it is damaged or lacks one of the keys.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        # Here, because the content may be anything.
        missing = [key for key in keys if key not in content]
    except OSError:
        raise
    except Exception as error:  # what torch raises depends on how a file is damaged
        raise DataError(f"{str(path)!r} is damaged or not a file of weights") from error
    if missing:
        raise DataError(f"{str(path)!r} has no {', '.join(missing)}: it is not a run's last.pt")
    return content


@contextmanager
def replacing(path):
    """A path to write to; if nothing goes wrong, what is written there replaces `path` at once."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.") as folder:
        scratch = Path(folder, path.name)
        yield scratch
        scratch.replace(path)


# ---------- Data sets in the Market-1501 layout ---------------------------------------------------


class Split(NamedTuple):
    """The images of a folder, with their labels."""

    paths: list[str]
    ids: np.ndarray  # (N,) identities as in the file names; in a gallery 0 is a distractor
    cams: np.ndarray  # (N,) cameras

    @property
    def labels(self):
        """(N,) the identities renumbered from 0, for a classifier."""
        return torch.from_numpy(np.unique(self.ids, return_inverse=True)[1])


def load_dataset(name, data_dir):
    """{"train": Split, "query": Split, "gallery": Split} of a set in DATASETS, under data_dir.

    The toy is drawn on first use. Raises DataError if the set is not found or cannot be used.
    """
    if name == "toy" and not find_folders(name, data_dir):
        draw_toy(Path(data_dir, "toy"))
    folder = find_folder(name, data_dir)
    splits = {split: read_split(folder / subfolder) for split, subfolder in FOLDERS.items()}
    _, query, gallery = splits.values()
    for identity, camera in zip(query.ids, query.cams, strict=True):
        if np.any((gallery.ids == identity) & (gallery.cams != camera)):
            return splits
    raise DataError(f"{str(folder)!r}: no query has a match from another camera; names are {NAMES}")


def find_folder(name, data_dir):
    """The folder with the set's name and all FOLDERS: data_dir, or one up to three levels below.

    Raises DataError if there is none, or several at the first level that has any.
    """
    folders = find_folders(name, data_dir)
    if len(folders) == 1:
        return folders[0]
    if folders:
        found = " and ".join(repr(str(folder)) for folder in folders)
        raise DataError(f"{name}: found {found}; choose one with --data-dir")
    wanted = f"named like '{DATASETS[name].words}' with {', '.join(FOLDERS.values())}"
    if name.startswith("cuhk03"):
        wanted += " (cuhk-03.mat is the raw release; use cuhk03-np)"
    others = [other for other in DATASETS if find_folders(other, data_dir)]
    there = f"; there is --dataset {' and '.join(others)}" if others else ""
    raise DataError(
        f"{name}: found no folder {wanted} in {str(data_dir)!r} or up to three folders below{there}"
    )


def find_folders(name, data_dir):
    """The set's folders at the first level that has any; that of the exact name, if it is there."""

    def squash(text):  # without punctuation
        return re.sub(r"[\W_]", "", text.lower())

    words = [squash(word) for word in DATASETS[name].words.split()]
    pattern = re.compile(rf"(^|/){'.*'.join(words)}\w*$")
    level = [Path(data_dir)]
    for _ in range(4):
        found = []
        below = []
        for folder in level:
            if all(os.path.isdir(folder / subfolder) for subfolder in FOLDERS.values()):
                # The names of its parent and itself, as in cuhk03-np/labeled.
                names = Path(os.path.abspath(folder)).parts[-2:]
                if pattern.search("/".join(map(squash, names))):
                    found.append(folder)
            if os.path.isdir(folder) and folder.name not in FOLDERS.values():
                below += sorted(folder.glob("[!._]*"))
        if found:
            # Several exact names differ only in case or punctuation: the first one is taken.
            exact = [folder for folder in found if squash(folder.name) == "".join(words)]
            return exact[:1] or found
        level = below
    return []


def read_split(folder):
    """The images of a folder, labelled by their NAMES, without junk (identity -1).

    Raises DataError if a name is not like that, or there are no images.
    """
    images = []  # (path, identity, camera)
    for file in sorted(os.listdir(folder)):
        if file.startswith(".") or not file.lower().endswith(EXTENSIONS):
            continue
        match = re.match(r"(-1|\d{1,18})_c(\d{1,18})[s_.]", file)
        if match is None:
            raise DataError(f"{str(folder / file)!r}: the name must be {NAMES}")
        if match[1] != "-1":
            images.append((str(folder / file), int(match[1]), int(match[2])))
    if not images:
        message = f"{str(folder)!r} holds no images ({', '.join(EXTENSIONS)})"
        if any(path.is_dir() for path in folder.iterdir()):
            message += "; move them up out of subfolders"
        raise DataError(message)
    paths, ids, cams = zip(*images, strict=True)
    return Split(list(paths), np.array(ids), np.array(cams))


def describe(name, splits):
    """The counts of each split, the published ones if they differ, and the folder."""
    lines = [f"{name:<16}{'images':>8}{'identities':>12}{'cameras':>9}"]
    for split, (paths, ids, cams) in splits.items():
        identities = np.unique(ids)
        if split == "gallery":  # there, identity 0 is a distractor unless a query has it
            identities = identities[(identities != 0) | np.isin(identities, splits["query"].ids)]
        counts = len(paths), len(identities)
        line = f"  {split:<14}{counts[0]:>8,}{counts[1]:>12,}{len(np.unique(cams)):>9}"
        published = DATASETS[name].counts.get(split, counts)
        if counts != published:
            line += "   published: {:,} and {:,}".format(*published)
        lines.append(line)
    return "\n".join([*lines, f"from {Path(paths[0]).parents[1]}"])


# ---------- Images and batches --------------------------------------------------------------------


class ImageDataset(Dataset):
    """Image files, resized, with a label each: [index] -> ((3, height, width) uint8 RGB, label)."""

    def __init__(self, paths, labels, height, width):
        self.paths = paths
        self.labels = labels
        self.size = [height, width]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        image = read_image(self.paths[index])
        return TF.resize(image, self.size), self.labels[index]  # not in the paper: bilinear


def read_image(path):
    """An image file as (3, H, W) uint8 RGB, upright, on white if it has an alpha channel.

    Raises DataError.
    """
    try:
        if not os.path.isfile(path):  # a named pipe would be waited for
            raise OSError("no such file")
        with Image.open(path, formats=FORMATS) as image:
            if image.mode[0] in "IF":  # Pillow would clip them to white
                raise OSError("more than 8 bits per channel")
            # Read it, then drop it from info: exif_transpose would write it back, and may fail to.
            image.getexif()
            image.info.pop("exif", None)
            image = ImageOps.exif_transpose(image)  # phones may store a photo sideways
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return TF.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # what Pillow raises depends on where a file is damaged
        raise DataError(
            f"cannot read the image {str(path)!r}: {error}; replace or remove it"
        ) from error


def normalize(images):
    """(B, 3, H, W) uint8 on any device -> normalised floats (Sec. 3.2).

    Not in the paper: ImageNet's mean and standard deviation. Raises TypeError for other dtypes.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"expected images in uint8, 0 to 255, not {images.dtype}")
    images = images.float()
    # Plain numbers: a tensor would have to be copied to the GPU, and Python would wait for it.
    for channel, mean, std in ((0, 0.485, 0.229), (1, 0.456, 0.224), (2, 0.406, 0.225)):
        images[:, channel].sub_(255 * mean).div_(255 * std)
    return images


def augment(images):
    """(B, 3, H, W) uint8 on any device -> flipped, normalised, with cutout (Sec. 3.2)."""
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5  # half of them
    return cutout(normalize(torch.where(flipped, images.flip(3), images)))


def cutout(images, probability=0.5):
    """Cutout: (B, C, H, W) normalised floats -> the same with a square of zeros (Sec. 3.2).

    Not in the paper: probability 0.5, one 64 x 64 square inside the image, 0 after normalisation;
    at sizes other than 384 x 128, about the same share of the area, 1/12.
    """
    batch, _, height, width = images.shape
    side = min(round(math.sqrt(height * width / 12)), height, width)

    def random_interval(size):  # (B, size) bool
        start = torch.randint(size - side + 1, (batch, 1), device=images.device)
        position = torch.arange(size, device=images.device)
        return (start <= position) & (position < start + side)

    square = random_interval(height)[:, None, :, None] & random_interval(width)[:, None, None]
    chosen = torch.rand(batch, 1, 1, 1, device=images.device) < probability
    return images.masked_fill(square & chosen, 0)  # mask: (B, 1, H, W)


class IdentitySampler:
    """A batch_sampler of P identities x K images (Sec. 3.2).

    labels (N,) identities of the images; yields lists of indices in which an identity's images are
    neighbours. Not in the paper: an epoch is identities // P steps, each identity at most once; its
    images are drawn with replacement if it has fewer than K. Batches depend only on seed and epoch:
    call set_epoch before each epoch. Process `rank` of `world_size` takes P / world_size
    identities.

    Raises DataError if there are fewer identities than P, or world_size does not divide P.
    """

    def __init__(
        self,
        labels,
        ids_per_batch=32,
        images_per_id=4,
        seed=0,
        rank=0,
        world_size=1,
    ):
        labels = np.asarray(labels)
        self.images_of_id = [np.flatnonzero(labels == identity) for identity in np.unique(labels)]
        identities = len(self.images_of_id)
        if identities < ids_per_batch:
            raise DataError(f"{identities} identities, but a batch needs {ids_per_batch}")
        if ids_per_batch % world_size:
            raise DataError(
                f"{ids_per_batch} identities are not divisible by {world_size} processes"
            )
        self.ids_per_batch = ids_per_batch
        self.images_per_id = images_per_id
        self.seed = seed
        self.rank = rank
        self.ids_per_process = ids_per_batch // world_size
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.images_of_id) // self.ids_per_batch

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        drawn = []  # for all identities, so that all processes use the same random numbers
        for identity in rng.permutation(len(self.images_of_id)):
            indices = self.images_of_id[identity]
            # The last argument: with replacement if there are too few.
            drawn.append(rng.choice(indices, self.images_per_id, len(indices) < self.images_per_id))
        for step in range(len(self)):
            start = step * self.ids_per_batch + self.rank * self.ids_per_process
            yield np.concatenate(drawn[start : start + self.ids_per_process]).tolist()


# ---------- The toy: people drawn with Pillow, the same each time ---------------------------------

SKINS = "#f0c8a8 #c98f68 #8a5a3c #5a3a2a".split()
HAIRS = "#1c1815 #4a3122 #a8793f #9a9a96".split()
CLOTHES = (
    "#b3282d #d98032 #d9c24a #3f7d4a #3b8f9c #2f4f96 #6d4a8c #c98aa2 #e6e3dc #8a8d90 #26262b"
).split()


def draw_toy(folder):
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
        with suppress(OSError):  # the toy is whole or not there, and another process was faster
            Path(scratch, "toy").rename(folder)


def draw_pedestrian(person, camera, number):
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
    width = who.uniform(22, 32)
    height = who.uniform(190, 225)
    x = when.normal(64, 6)
    feet = when.normal(244, 4)
    stride = when.uniform(-0.5, 0.5)

    def at(*points):  # half-widths, heights
        return [(x + dx * width, feet - dy * height) for dx, dy in points]

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
    # pattern 0: plain, 1: hoops, 2: stripes, 3: checks
    second_colour = (row * (pattern & 1) + column * (pattern >> 1)) % 2 == 1
    canvas.paste(top, mask=torso)
    canvas.paste(second, mask=Image.fromarray(second_colour & np.asarray(torso)))
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
