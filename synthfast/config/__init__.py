"""One dataclass a stage: every option, its default and its help, once. The command line and TOML files are made from them.

A TOML file holds the field names at its top level (``steps = 4000``, ``eps = "8/255"``); unknown keys and wrong types are
errors. This module imports no torch, so that ``synthfast --help`` is quick.
"""

from synthfast.config.arc import ArcConfig
from synthfast.config.classifier import ALL_IMAGES, ClassifierConfig, for_method
from synthfast.config.evaluation import AccuracyConfig, InflectionConfig, RobustConfig
from synthfast.config.fields import DEFAULT_RADIUS, radius
from synthfast.config.files import RECIPES, make_config, number, read_toml, recipe_values, to_toml, tomllib
from synthfast.config.generator import GeneratorConfig
from synthfast.config.metrics import FidConfig, PrdcConfig
from synthfast.config.rank import RankConfig
from synthfast.config.report import ReportConfig
from synthfast.config.sample import SampleConfig
from synthfast.config.samples import CRITERIA, SAMPLE_SCORES, SamplesConfig, SelectConfig
from synthfast.config.transfer import ExportConfig, ImportConfig, MergeConfig, SplitConfig, StatsConfig

__all__ = [
    "ALL_IMAGES",
    "CRITERIA",
    "DEFAULT_RADIUS",
    "RECIPES",
    "SAMPLE_SCORES",
    "AccuracyConfig",
    "ArcConfig",
    "ClassifierConfig",
    "ExportConfig",
    "FidConfig",
    "GeneratorConfig",
    "ImportConfig",
    "InflectionConfig",
    "MergeConfig",
    "PrdcConfig",
    "RankConfig",
    "ReportConfig",
    "RobustConfig",
    "SampleConfig",
    "SamplesConfig",
    "SelectConfig",
    "SplitConfig",
    "StatsConfig",
    "for_method",
    "make_config",
    "number",
    "radius",
    "read_toml",
    "recipe_values",
    "to_toml",
    "tomllib",
]
