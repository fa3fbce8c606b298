"""What a drafter is told of its target, and the live parts of the target that it borrows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from trainkit.layers.shape import DecoderShape


@dataclass(frozen=True)
class TargetShape:
    """Everything that building a drafter needs to know of a target; saved in checkpoints and bundles.

    Attributes:
        decoder: Sizes, head counts, rotary parameters, norm epsilon, vocabulary.
        end_ids: Token ids that end a text: the union of config, generation config and tokenizer.
        pad_id: Id used for padding, or None.
        fingerprint: `config`, `tokenizer` hashes (hex) and `path` (where it was read).
    """

    decoder: DecoderShape
    end_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    fingerprint: Mapping[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; `TargetShape.from_dict` reads it back."""
        return asdict(self) | {"decoder": self.decoder.to_dict(), "end_ids": list(self.end_ids)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TargetShape:
        """The shape that `to_dict` wrote."""
        return TargetShape(
            decoder=DecoderShape(**values["decoder"]),
            end_ids=tuple(values["end_ids"]),
            pad_id=values["pad_id"],
            fingerprint=values["fingerprint"],
        )


@dataclass(frozen=True)
class TargetHandle:
    """The live target's shared parts; training and runner each pass theirs, and no drafter stores them.

    Attributes:
        embed: Token ids [...] -> embeddings [..., D].
        head: Hidden states after the final norm [..., D] -> logits [..., V].
        vocab_size: V.
    """

    embed: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    vocab_size: int
