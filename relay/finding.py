"""What `relay check` found."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at."""

    ok: bool
    subject: str
    #: What was found; if it is not ok, what to do.
    text: str
