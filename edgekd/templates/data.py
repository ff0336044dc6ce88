"""The data: replace this with your own. Here: squares, discs, crosses and stripes in noise, drawn from a fixed seed."""

import torch
from torch.utils.data import Subset, TensorDataset

SIZE = 16


def splits():
    """Return the splits as data sets of (input, label). They must not share samples, except that calibration comes from train."""
    train = TensorDataset(*draw(3000, seed=1))
    return {
        "train": train,
        "validation": TensorDataset(*draw(500, seed=2)),
        "calibration": Subset(train, range(200)),
        "evaluation": TensorDataset(*draw(2000, seed=3)),
    }


def draw(count, seed):
    """Return images (count, 1, 16, 16) and labels (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    centre = torch.randint(5, 11, (count, 2), generator=generator)
    y, x = row - centre[:, :1, None], column - centre[:, 1:, None]
    shapes = torch.stack(
        [
            (y.abs() <= 3) & (x.abs() <= 3),
            y**2 + x**2 <= 14,
            ((y.abs() <= 1) | (x.abs() <= 1)) & (y.abs() <= 4) & (x.abs() <= 4),
            (y % 3 == 0) & (y.abs() <= 4) & (x.abs() <= 4),
        ]
    ).float()
    images = shapes[labels, torch.arange(count)] + 0.35 * torch.randn(count, SIZE, SIZE, generator=generator)
    return images.unsqueeze(1), labels
