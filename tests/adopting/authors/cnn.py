import torch
from torch import nn
import torch.nn.functional as F


def conv(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class SmallCNN(nn.Module):
    """For 32x32 pictures such as CIFAR's."""

    def __init__(self, num_classes=10, width=16, in_channels=3, dropout=0.2):
        super().__init__()
        self.features = nn.Sequential(
            conv(in_channels, width),
            conv(width, 2 * width, stride=2),
            conv(2 * width, 4 * width, stride=2),
        )
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(self.dropout(x))
