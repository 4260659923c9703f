"""Handwritten digits that come with scikit-learn: 1,797 real images of 8x8 pixels, no download."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_prune.errors import OptionError, PruneError

__all__ = ["Digits", "ImageSet"]

N_IMAGES = 1797
MIN_PART = 10  # images: a stratified part holds every one of the ten classes
Batch = tuple[Tensor, Tensor]


class ImageSet(Dataset[Batch]):
    """Images and labels in memory, indexed a whole batch at a time.

    Args:
        images: [n, 1, 8, 8], float32.
        labels: [n], int64 in [0, 10).

    >>> part = ImageSet(torch.zeros(3, 1, 8, 8), torch.arange(3))
    >>> len(part), part.__getitems__([2, 0])[1].tolist()
    (3, [2, 0])
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Give one batch; torch's loader asks for it by this name, which saves one call per image."""
        chosen = torch.as_tensor(indices)
        return self.images[chosen], self.labels[chosen]


class Digits(LightningDataModule):
    """Split the digits into train, val and test, every class in equal shares, always in the same way.

    Args:
        batch_size: Images per batch, >= 1.
        val_size: Images for validation, >= 10.
        test_size: Images for the final test, >= 10.
        split_seed: Seed of the split, >= 0. It is not the seed of a run: all runs share one test split.

    Raises:
        OptionError: If a size is out of range or fewer than 10 images are left to train on.
        PruneError: If scikit-learn is not installed.

    >>> data = Digits(batch_size=50)
    >>> data.setup("fit")
    >>> images, labels = next(iter(data.val_dataloader()))
    >>> images.shape, labels.dtype
    (torch.Size([50, 1, 8, 8]), torch.int64)
    """

    def __init__(
        self,
        *,
        batch_size: int = 50,
        val_size: int = 200,
        test_size: int = 597,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise OptionError(f"batch_size={batch_size} was asked for: a batch holds at least 1 image")
        smallest = min(val_size, test_size, N_IMAGES - val_size - test_size)
        if smallest < MIN_PART:
            raise OptionError(
                f"val_size={val_size} and test_size={test_size} were asked for: there are {N_IMAGES} images, "
                f"and train, val and test each need {MIN_PART}, one per class; choose other sizes"
            )
        if find_spec("sklearn") is None:
            raise PruneError(
                "the digits were asked for: they come with scikit-learn, which is not installed; "
                "pip install 'lightning-prune[demo]'"
            )
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed
        self.parts: dict[str, ImageSet] = {}

    def setup(self, stage: str) -> None:
        """Read and split the images, once."""
        if not self.parts:
            self.parts = _split(self.val_size, self.test_size, self.split_seed)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Give shuffled batches; the order follows torch's global seed."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Give the validation images in fixed order."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Give the test images in fixed order."""
        return self._loader("test", shuffle=False)

    def _loader(self, part: str, *, shuffle: bool) -> DataLoader[Batch]:
        return DataLoader(self.parts[part], batch_size=self.batch_size, shuffle=shuffle, collate_fn=_as_is)


def _as_is(batch: Any) -> Any:
    """Collate nothing: ``ImageSet`` gives whole batches."""
    return batch


def _split(val_size: int, test_size: int, seed: int) -> dict[str, ImageSet]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # 16 grey levels, brought to mean 0 and deviation 1 by the numbers of the whole set
    images = torch.as_tensor((digits.images - 4.88) / 6.02, dtype=torch.float32).unsqueeze(1)  # [n, 1, 8, 8]
    labels = torch.as_tensor(digits.target, dtype=torch.int64)  # [n]
    rest, test = train_test_split(
        range(len(labels)), test_size=test_size, stratify=labels.numpy(), random_state=seed
    )
    train, val = train_test_split(rest, test_size=val_size, stratify=labels[rest].numpy(), random_state=seed)
    return {
        name: ImageSet(images[index], labels[index])
        for name, index in (("train", train), ("val", val), ("test", test))
    }
