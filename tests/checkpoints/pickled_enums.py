"""Enums in a file of their own, which the process that reads a pickle has to import."""

import enum


class Colour(str, enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    LOW = 1


class Half(float, enum.Enum):
    HALF = 0.5
