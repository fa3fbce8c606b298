"""What a drafter needs to know of its target, and the parts of the target that it uses."""

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
        fingerprint: Digests `config` and `tokenizer` (hex), and `path` (folder name), of `bundle.fingerprint`.
        undecodable: Why trainkit's runner cannot decode this target; empty if it can. Drafters are trained and exported anyway.
    """

    decoder: DecoderShape
    end_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    fingerprint: Mapping[str, str] | None = None
    undecodable: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; `TargetShape.from_dict` reads it back."""
        return asdict(self) | {"decoder": self.decoder.to_dict(), "end_ids": list(self.end_ids)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TargetShape:
        """The shape that `to_dict` wrote."""
        decoder, ends = DecoderShape(**values["decoder"]), tuple(values["end_ids"])
        return TargetShape(decoder, ends, values["pad_id"], values["fingerprint"], values.get("undecodable", ""))


@dataclass(frozen=True)
class TargetHandle:
    """The parts of the loaded target that a drafter calls; training and runner each pass theirs, and no drafter stores them.

    Attributes:
        embed: Token ids [...] -> embeddings [..., D].
        head: Hidden states after the final norm [..., D] -> logits [..., V].
        vocab_size: V.
    """

    embed: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    vocab_size: int
