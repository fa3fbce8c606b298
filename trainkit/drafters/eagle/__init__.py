"""Kind `eagle`: EAGLE-3, a decoder layer over the target's hidden states that drafts from its own outputs."""

from trainkit.drafters.eagle.network import Eagle

__all__ = ["Eagle"]
