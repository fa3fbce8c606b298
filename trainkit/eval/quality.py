"""Quality of a causal LM on given tokens: perplexity, and divergence from and agreement with a dense model.

Logits exist for a few hundred positions at a time, never for a whole text. Sums are kept for each text, because intervals
resample texts: the tokens of one text are not independent.
"""

# B batch rows  T positions  N predicted tokens  D hidden  V vocabulary  Q texts

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainkit.bundle import read_json
from trainkit.errors import UserError
from trainkit.eval import bootstrap
from trainkit.eval.bootstrap import Interval
from trainkit.eval.perplexity import Text
from trainkit.files import write_json
from trainkit.models.target import check_head, load_model

LOGITS = 2**24
"""Largest number of logits of a model that exist at once; 64 MB in float32."""
Sums = dict[str, np.ndarray]
"""Sums over the predicted tokens of each text [Q]: `tokens` (their number), `nll`; with a dense model `nll_dense`, `kl`,
`agreement`."""


class LanguageModel:
    """Any causal LM that transformers loads.

    Args:
        folder: Its folder.
        dtype: Precision of weights and hidden states; log-probabilities are float32.
        device: Torch device.

    Raises:
        UserError: no causal LM there, or its weights are broken.
    """

    def __init__(self, folder: str | Path, dtype: torch.dtype, device: torch.device) -> None:
        self.name, self.device = str(folder), device
        self._model: Any = load_model(folder, dtype).requires_grad_(False).eval().to(device)
        self.vocab_size: int = self._model.get_output_embeddings().weight.shape[0]
        self._has_plain_head = True
        try:
            check_head(self._model, self.name)
        except UserError as error:
            if error.__cause__ is not None:  # the model does not run at all
                raise
            self._has_plain_head = False  # a soft-cap or scale: logits of whole texts are computed

    def states(self, tokens_BT: Tensor) -> Tensor:
        """Hidden states [B, T, D], which `log_probs` takes; for a model with soft-capped or scaled logits, those logits."""
        if self._has_plain_head:
            return self._model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        return self._model(input_ids=tokens_BT, use_cache=False).logits

    def log_probs(self, states_ND: Tensor) -> Tensor:
        """Log-probabilities [N, V] of the next token, in nats, float32."""
        logits_NV = self._model.get_output_embeddings()(states_ND) if self._has_plain_head else states_ND
        return logits_NV.float().log_softmax(-1)


@torch.inference_mode()
def measure(
    model: LanguageModel,
    texts: Sequence[Text],
    dense: LanguageModel | None = None,
    batch: int = 8,
    state: Path | None = None,
    key: str = "",
) -> Sums:
    """Sums of each text over its predicted tokens; kl is KL(dense || model), agreement the number of equal top-1 tokens.

    Args:
        model: The model to evaluate.
        texts: Token sequences.
        dense: The model to compare with.
        batch: Number of texts read together, padded at their end.
        state: File for the sums so far, from which the same call continues after a kill, with the same result.
        key: Everything that determines the result; the sums of another key in `state` are not used.

    Raises:
        UserError: the vocabularies differ, or a log-probability is not finite.
    """
    from tqdm import tqdm

    if dense is not None and dense.vocab_size != model.vocab_size:
        sizes = f"a vocabulary of {dense.vocab_size}, {model.name} one of {model.vocab_size}"
        raise UserError(f"{dense.name}: has {sizes}; give the model it was made from as --dense")
    names = ["tokens", "nll", *(["nll_dense", "kl", "agreement"] if dense else [])]
    sums, done = {name: np.zeros(len(texts)) for name in names}, 0
    if state is not None and state.is_file() and (stored := read_json(state)).get("key") == key:
        sums, done = {name: np.array(stored["sums"][name]) for name in names}, int(stored["done"])
    chunk = max(16, LOGITS // model.vocab_size)
    bar = tqdm(total=len(texts), initial=done, desc="evaluate", unit=" texts", disable=None, delay=2)
    for begin in range(done, len(texts), batch):
        # Read the texts; keep the states that predict a counted token.
        rows = texts[begin : begin + batch]
        tokens_BT = pad_sequence([text.tokens_T for text in rows], batch_first=True).to(model.device)
        lengths_B, starts_B = (
            torch.tensor(values) for values in ([len(text.tokens_T) for text in rows], [text.start for text in rows])
        )
        places_T = torch.arange(1, tokens_BT.shape[1])
        counted_BT = (places_T >= starts_B[:, None]) & (places_T < lengths_B[:, None])
        text_N = (begin + counted_BT.nonzero()[:, 0]).numpy()
        counted_BT = counted_BT.to(model.device)
        labels_N = tokens_BT[:, 1:][counted_BT]
        states = [one.states(tokens_BT[:, :-1])[counted_BT] for one in (model, dense) if one is not None]
        # Compute each token's values a few hundred at a time, and add them to their text's sums.
        values: dict[str, list[Tensor]] = {name: [] for name in names[1:]}
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            log_q_NV, label_N1 = model.log_probs(states[0][part]), labels_N[part, None]
            values["nll"].append(-log_q_NV.gather(1, label_N1)[:, 0])
            if dense is not None:
                log_p_NV = dense.log_probs(states[1][part])
                values["nll_dense"].append(-log_p_NV.gather(1, label_N1)[:, 0])
                values["kl"].append((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1))
                values["agreement"].append((log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).float())
        for name, parts in values.items():
            value_N = torch.cat(parts).double().cpu().numpy()
            if not np.isfinite(value_N).all():
                whose = dense.name if dense is not None and name == "nll_dense" else model.name
                number = int(text_N[~np.isfinite(value_N)][0]) + 1
                raise UserError(
                    f"{whose}: log-probabilities of text {number} are not finite; give --dtype float32 or fix the model"
                )
            sums[name] += np.bincount(text_N, value_N, len(texts))
        sums["tokens"] += np.bincount(text_N, minlength=len(texts))
        bar.update(len(rows))
        if state is not None:
            values_of = {name: value_Q.tolist() for name, value_Q in sums.items()}
            write_json(state, {"key": key, "done": begin + len(rows), "sums": values_of})
    bar.close()
    return sums


def summarise(sums: Sums) -> dict[str, Interval]:
    """Means over all predicted tokens, with 95 % bootstrap intervals over texts.

    `perplexity` is exp(nll); with a dense model also `perplexity_dense`, their `ratio` (model / dense, the same texts in each
    resample), `kl` in nats per token, and `agreement`, the share of tokens at which both have the same likeliest token.
    """
    mean = {name: bootstrap.mean(values, sums["tokens"]) for name, values in sums.items() if name != "tokens"}
    found = {"perplexity": _exp(mean["nll"])}
    if "nll_dense" in sums:
        ratio = bootstrap.mean(sums["nll"] - sums["nll_dense"], sums["tokens"])
        found |= {
            "perplexity_dense": _exp(mean["nll_dense"]),
            "ratio": _exp(ratio),
            "kl": mean["kl"],
            "agreement": mean["agreement"],
        }
    return found


def _exp(interval: Interval) -> Interval:
    return Interval(*(math.exp(min(part, 700.0)) for part in (interval.value, interval.low, interval.high)))  # no overflow
