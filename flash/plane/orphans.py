"""
Launches by their keys: which are this plane's, and which of those nobody has any claim to.

A key is `flash-<owner>-<run>-<attempt>`. Only what is written exactly so, with our own owner, is
ever ours; whatever else a provider lists belongs to somebody, and is not touched.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from flash.plane.ids import is_run_id

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from flash.values import Instance

# No dash in an owner and none in a run id, so a key can be read in one way only.
_KEY: Final = re.compile(
    r"flash-(?P<owner>[a-z0-9]+)-(?P<run>[a-z0-9]+)-(?P<number>[1-9][0-9]{0,8})"
)


def key_of(owner: str, run: str, number: int) -> str:
    """Return the key of a run's attempt, by which its provider knows the launch."""
    return f"flash-{owner}-{run}-{number}"


def parse_key(key: str, owner: str) -> tuple[str, int] | None:
    """Return the run and the attempt's number of a key of `owner`; None for any other key."""
    match = _KEY.fullmatch(key)
    if match is None or match["owner"] != owner or not is_run_id(match["run"]):
        return None
    return match["run"], int(match["number"])


def orphans(
    instances: Iterable[Instance], owner: str, protected: Collection[str]
) -> list[Instance]:
    """
    Return the instances that are exactly ours and that no attempt has a claim to.

    `instances` is a whole listing of one provider; where the listing failed there is nothing to
    ask. `protected` are the keys of the attempts that may have a launch, read after the listing:
    what was launched since it was made is not in it, and what is in it has been recorded before
    its launch.
    """
    return [
        instance
        for instance in instances
        if instance.key not in protected and parse_key(instance.key, owner) is not None
    ]
