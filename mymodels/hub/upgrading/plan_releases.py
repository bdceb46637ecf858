"""Which releases an upgrade is for, and which old ones the original may run under."""

import re
from collections.abc import Iterable, Sequence

from ..releases import OLD_RELEASES, RELEASES, PinnedRelease, nearest, resolve
from ..static.api_availability import Minor

SPREAD = ("4.56", "4.57", "5.0", "5.4", "5.10", "5.23")  # where most of the breaking changes lie between
_TRIED = ("4.46", "4.41", "4.36")  # if the original does not run under its own


def target_releases(wanted: str | Iterable[str] | None) -> list[PinnedRelease]:
    """The releases that the result must run under, oldest first.

    Args:
        wanted: a range such as `"4.56-5.23"`, of which some are tried; or a list, as `releases.resolve` takes it.

    Raises:
        ValueError: a release is not supported, or the range is empty.
    """
    if wanted is None:
        return resolve(SPREAD)
    if isinstance(wanted, str) and (ends := re.fullmatch(r"\s*([\w.]+)\s*-\s*([\w.]+)\s*", wanted)):
        first, last = (resolve(end)[0] for end in ends.groups())
        if _minor(first.transformers) > _minor(last.transformers):
            raise ValueError(f"the range {wanted} is empty: write the older release first")
        between = [r for r in resolve(SPREAD) if _minor(first.transformers) <= _minor(r.transformers)]
        between = [r for r in between if _minor(r.transformers) <= _minor(last.transformers)]
        inner = [
            r for r in between if _minor(r.transformers) not in map(_minor, (first.transformers, last.transformers))
        ]
        return list(dict.fromkeys([first, *inner, last]))
    return resolve(wanted)


def old_releases(named: str | None, config_version: object) -> list[PinnedRelease]:
    """The releases to try the original under, the likeliest first.

    Args:
        named: by the caller (`--from`): then this one alone.
        config_version: `transformers_version` of the config: where the folder was saved, which is no promise.
    """
    if named is not None:
        return [nearest(named)]
    found = []
    if isinstance(config_version, str) and re.match(r"\d+\.\d+", config_version):
        found.append(nearest(config_version))
    known = OLD_RELEASES | RELEASES
    return list(dict.fromkeys([*found, *(PinnedRelease(*known[minor]) for minor in _TRIED)]))


def span_of(releases: Sequence[PinnedRelease]) -> tuple[Minor, Minor]:
    """The first and last minor version of some releases."""
    minors = sorted(_minor(release.transformers) for release in releases)
    return minors[0], minors[-1]


def _minor(version: str) -> Minor:
    first, second = version.split(".")[:2]
    return int(first), int(second)
