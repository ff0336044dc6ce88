"""Teacher and student: replace these with your own. Each function returns a torch.nn.Module whose output is logits."""

from torch import nn


def teacher():
    """Return the large network."""
    return nn.Sequential(
        *block(1, 24), *block(24, 48), nn.MaxPool2d(2), *block(48, 48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4)
    )


def student():
    """Return the small network that ships."""
    return nn.Sequential(*block(1, 8), *block(8, 16, stride=2), *block(16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def block(inputs, outputs, stride=1):
    """Return a convolution with batch norm, which folds into it on export."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
