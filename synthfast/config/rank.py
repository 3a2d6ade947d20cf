"""Options of ``synthfast rank``."""

from __future__ import annotations

from dataclasses import dataclass

from synthfast.config.evaluation import TrialConfig
from synthfast.config.fields import allow_lossy_option, option, require
from synthfast.errors import UsageError


@dataclass(frozen=True)
class RankConfig(TrialConfig):
    """``synthfast rank``: which generator makes the best training data, and which score tells so."""

    sources: tuple[str, ...] = option(
        (),
        "Shard folders, or generators as synthfast sample takes them; NAME=SOURCE gives one a name.",
        metavar="GENERATOR_OR_SHARDS...",
        positional=True,
    )
    real: str = option("digits:test", "Real images that the scores compare with.")
    samples: int = option(10_000, "Images sampled from each generator, and the first ones of each shard folder.")
    method: str = option(
        "pgd", "Training of the classifiers on synthetic images alone.", choices=("standard", "pgd", "trades")
    )
    seeds: int = option(3, "Classifiers of each generator; their mean counts.")
    arc: str | None = option(
        None, "TOML file with further settings of synthfast score arc (norm, eps, radii, ...).", metavar="FILE"
    )
    features: str | None = option(None, "Features of fid and prdc (see synthfast score fid).", metavar="NAME")
    allow_lossy: bool = allow_lossy_option()
    out: str = option("runs/rank", "Folder for samples, classifiers, result.json and rank.png.", metavar="DIR")

    def __post_init__(self) -> None:
        if len(self.sources) < 2:
            found = "none" if not self.sources else "one"
            raise UsageError(f"expected two generators or shard folders or more, found {found}; name them")
        require(self.samples >= 2, "--samples", self.samples, "a whole number of at least 2")
        require(self.seeds >= 1, "--seeds", self.seeds, "a whole number of at least 1")
        super().__post_init__()
