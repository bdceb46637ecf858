"""Images, audio and series of numbers: shapes that a config asks for, and values to fill them with."""

import math
from collections.abc import Iterator
from typing import Any

import torch

PICTURES, SOUNDS = ("pixel_values",), ("input_features", "input_values")


def wave(shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers between -1 and 1, neighbours unequal, a different mean in each row, the same on every machine."""
    values = (torch.arange(math.prod(shape), dtype=torch.float64) * 0.6180339887 % 2 - 1).reshape(shape)
    if len(shape) > 1 and shape[0] > 1:  # mixing of rows is detected only where they differ
        row = torch.arange(shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1)) / shape[0]
        values = values * (1 - row) + row / 2
    return values.float()


def shapes(model: Any, name: str) -> Iterator[tuple[int, ...]]:
    """Possible shapes of an image or audio input, those from the config first."""
    config = model.config
    parts = [config, *(getattr(config, part, None) for part in ("vision_config", "audio_config", "backbone_config"))]

    def config_values(*names: str) -> Iterator[Any]:
        for part in parts:
            for attribute in names:
                if getattr(part, attribute, None) is not None:
                    yield getattr(part, attribute)

    if name in PICTURES:
        channels = next((n for n in config_values("num_channels", "in_channels", "in_chans") if isinstance(n, int)), 3)
        for size in [*config_values("image_size", "img_size", "input_size"), 224, 64, 32]:
            sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
            if len(sides) == 2 and all(isinstance(side, int) for side in sides):
                yield (2, channels, *sides)
    elif name == "input_features":
        bins = next(
            config_values("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim"), 80
        )
        frames = next(config_values("max_source_positions"), 0)
        yield from ((2, bins, 2 * frames),) if frames else ()
        yield from ((2, 128, bins), (2, bins, 128), (2, 3000, bins), (2, bins, 3000))
    else:
        bins, frames = next(config_values("num_mel_bins"), 0), next(config_values("max_length"), 0)
        yield from ((2, frames, bins),) if bins and frames else ()
        yield from ((2, 4000), (2, 1, 4000), (2, 16000), (2, 1000), (2, 400))


def series_shapes(model: Any, length: int) -> Iterator[tuple[int, ...]]:
    """Possible shapes of a series of numbers that a model takes as `input_ids`: two rows, with and without channels."""
    sizes = model.config.to_dict()
    yield (2, length)
    for channels in dict.fromkeys([*(sizes.get(n) for n in ("input_size", "num_input_channels", "input_dim")), 1]):
        if is_size(channels):
            yield (2, length, channels)


def is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 4096
