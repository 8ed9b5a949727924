"""Small networks that the tests share."""

import torch
import torch.nn.functional as F
from torch import nn


class FunctionalReLUs(nn.Module):
    """Convolutions with every way to call a ReLU without a module: what hook-based libraries miss."""

    def __init__(self, num_classes=5):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.fourth = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = torch.relu(self.second(x))
        x = F.relu(self.third(x), inplace=True)
        x = self.fourth(x).relu_()
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """A bit of everything: strides, groups, a residual sum, concatenation, ReLU in place, pooling."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding="same", groups=2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 1),
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.last = nn.BatchNorm2d(16, affine=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.stem(x))))
        x = torch.cat([x, torch.relu(x + self.deep(x))], 1)
        x = F.avg_pool2d(F.silu(self.last(x)), 2)
        return self.head(x.mean((2, 3)))


def conv_bn(activation=nn.ReLU, num_classes=4):
    """Two convolutions, each with batch norm and an activation: the smallest network with every difficulty."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        activation(),
        nn.Conv2d(5, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, num_classes),
    )


def without_inplace(model):
    """The model with every in-place activation made an ordinary one (hook-based libraries need that)."""
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return model
