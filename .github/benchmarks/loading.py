"""Images per second that a DataLoader reads for 384 x 128, by ImageDataset and by its usual rival.

The rival is Pillow with torchvision's v1 transforms, which also augment. From the repository's
folder, for a folder of JPEGs such as bounding_box_train:

    PYTHONPATH=. python .github/benchmarks/loading.py FOLDER
"""

import sys
import time
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms as T

from data import ImageDataset


class Rival(ImageDataset):
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
        image = Image.open(self.paths[index]).convert("RGB")
        return self.transform(image), self.labels[index]


if __name__ == "__main__":
    paths = sorted(map(str, Path(sys.argv[1]).glob("*.jpg")))[:512]
    for dataset, workers in ((Rival, 1), (ImageDataset, 1), (Rival, 2), (ImageDataset, 2)) * 3:
        loader = DataLoader(
            dataset(paths, range(len(paths)), 384, 128),
            batch_size=64,
            num_workers=workers,
            persistent_workers=True,
        )
        list(loader)  # starts the workers
        start = time.perf_counter()
        for _ in loader:
            pass
        seconds = time.perf_counter() - start
        print(f"{dataset.__name__:<14}{workers} workers  {len(paths) / seconds:.0f} images/s")
