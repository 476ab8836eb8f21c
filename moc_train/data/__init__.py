"""Text, tokens, and the order in which they are trained on."""

from moc_train.data.loader import SampleLoader, StepSamples
from moc_train.data.tokens import TokenFile, prepare

__all__ = ["SampleLoader", "StepSamples", "TokenFile", "prepare"]
