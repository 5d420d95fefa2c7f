"""Reading JPEGs for 384 x 128, beside Pillow and torchvision's v1 transforms (which also augment).

From the repository's folder: PYTHONPATH=. python .github/benchmarks/loading.py FOLDER_OF_JPEGS
"""

import sys
import time
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T

from data import ImageDataset


class Peer(ImageDataset):
    transform = T.Compose(
        [
            T.Resize((384, 128)),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            T.RandomErasing(),
        ]
    )

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), index


if __name__ == "__main__":
    paths = sorted(map(str, Path(sys.argv[1]).glob("*.jpg")))[:512]
    for dataset, workers in ((Peer, 1), (ImageDataset, 1), (Peer, 2), (ImageDataset, 2)) * 3:
        loader = DataLoader(
            dataset(paths, 384, 128), 64, num_workers=workers, persistent_workers=True
        )
        list(loader)  # starts the workers
        start = time.perf_counter()
        for _ in loader:
            pass
        print(
            dataset.__name__, workers, f"{len(paths) / (time.perf_counter() - start):.0f} images/s"
        )
