"""Kind `lm`: a small language model that drafts for the target."""

from trainkit.drafters.lm.network import LMDraft

__all__ = ["LMDraft"]
