"""The decoder-only mixture-of-experts transformer."""

from moc_train.model.transformer import StepLosses, Transformer

__all__ = ["StepLosses", "Transformer"]
