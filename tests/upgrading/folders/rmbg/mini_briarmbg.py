import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel

from .MyConfig import RMBGConfig


class ConvNormAct(nn.Module):
    def __init__(self, in_ch=3, out_ch=3, dirate=1):
        super(ConvNormAct, self).__init__()
        self.conv = nn.Conv2d(in_ch, out_ch, 3, padding=dirate, dilation=dirate)
        self.bn = nn.BatchNorm2d(out_ch)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def resize_like(src, tar):
    """Makes the picture `src` as large as `tar`."""
    return F.interpolate(src, size=tar.shape[2:], mode="bilinear")


class NestedU(nn.Module):
    """A small U inside a stage of the large one."""

    def __init__(self, in_ch, mid_ch, out_ch):
        super().__init__()
        self.into = ConvNormAct(in_ch, out_ch)
        self.down1 = ConvNormAct(out_ch, mid_ch)
        self.down2 = ConvNormAct(mid_ch, mid_ch)
        self.middle = ConvNormAct(mid_ch, mid_ch, dirate=2)
        self.up2 = ConvNormAct(mid_ch * 2, mid_ch)
        self.up1 = ConvNormAct(mid_ch * 2, out_ch)
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)

    def forward(self, x):
        x = self.into(x)
        one = self.down1(x)
        two = self.down2(self.pool(one))
        made = self.up2(torch.cat((self.middle(two), two), 1))
        return self.up1(torch.cat((resize_like(made, one), one), 1)) + x


class MiniBriaRMBG(PreTrainedModel):
    config_class = RMBGConfig
    main_input_name = "pixel_values"

    def __init__(self, config: RMBGConfig = RMBGConfig()):
        super().__init__(config)
        in_ch = config.in_ch
        width = config.width
        self.conv_in = nn.Conv2d(in_ch, width, 3, stride=2, padding=1)
        self.stage1 = NestedU(width, width // 2, width)
        self.pool12 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.stage2 = NestedU(width, width // 2, width * 2)
        self.stage1d = NestedU(width * 3, width // 2, width)
        self.side1 = nn.Conv2d(width, config.out_ch, 3, padding=1)
        self.side2 = nn.Conv2d(width * 2, config.out_ch, 3, padding=1)
        weights = torch.linspace(0.25, 1.0, 2)
        self.side_weights = [w.item() for w in weights]

    def forward(self, pixel_values):
        hx = self.conv_in(pixel_values)
        hx1 = self.stage1(hx)
        hx2 = self.stage2(self.pool12(hx1))
        hx1d = self.stage1d(torch.cat((resize_like(hx2, hx1), hx1), 1))
        d1 = resize_like(self.side1(hx1d), pixel_values) * self.side_weights[1]
        d2 = resize_like(self.side2(hx2), pixel_values) * self.side_weights[0]
        return [torch.sigmoid(d1), torch.sigmoid(d2)], [hx1d, hx2]
