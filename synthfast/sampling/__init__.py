"""Sampling: generators (embedded, trained, from diffusers, your own) and the loop that turns an index range into shards."""

from synthfast.sampling.generate import Progress, Sampled, generate
from synthfast.sampling.generators import DiffusionGenerator, Generator, load_generator
from synthfast.sampling.labels import LabelPlan

__all__ = ["DiffusionGenerator", "Generator", "LabelPlan", "Progress", "Sampled", "generate", "load_generator"]
