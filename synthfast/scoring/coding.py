"""Whether two sets were stored in ways that let them be compared."""

from __future__ import annotations

from synthfast.data import ImageSet
from synthfast.errors import UsageError


def require_same_coding(real: ImageSet, synthetic: ImageSet | str, *, allow: bool) -> None:
    """UsageError if lossy coding has left its traces in one of the sets alone, unless ``allow``.

    The blocks of jpg are not seen by eyes, but by discriminators and by the networks whose features FID compares: such a
    score would tell how images were stored. If both sets are lossy neither gives itself away by it. ``synthetic`` may be
    the name of images that are to be sampled, which are lossless.
    """
    name, lossy = (synthetic, False) if isinstance(synthetic, str) else (synthetic.name, synthetic.lossy)
    if allow or real.lossy == lossy:
        return
    coded, plain = (real.name, name) if real.lossy else (name, real.name)
    raise UsageError(
        f"{coded}: stored as jpg or webp, whose traces scores see, and {plain} is lossless; expected both stored alike: "
        "store the images as png, or pass --allow-lossy"
    )
