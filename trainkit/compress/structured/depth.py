"""Removes blocks one after the other: each time the block whose removal changes the model's distributions least.

The score of a block is the mean KL(dense || model without it and without those removed before), in nats per counted calibration
token. Every remaining block is scored in every round, in the model without the blocks that were removed before.
"""

# S sequences  B sequences of a batch  T positions  D hidden  N counted tokens  V vocabulary

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trainkit.compress.blocks import Sequences, origin
from trainkit.compress.divergence import divergences
from trainkit.compress.work import BATCH_TOKENS, claimed, rank, world
from trainkit.errors import UserError
from trainkit.files import write_json
from trainkit.models.target import load_model


class _Blocks:
    """A model's blocks, any of which can be run in order."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
        model = load_model(folder, dtype).to(device).eval().requires_grad_(False)
        self.backbone, self.head = model.get_decoder(), model.get_output_embeddings()
        self.embed, self.norm = self.backbone.embed_tokens, self.backbone.norm
        self.layers, self.types = list(self.backbone.layers), getattr(model.config, "layer_types", None)
        self.backbone.norm = nn.Identity()

    def run(self, x_BTD: Tensor, indices: list[int]) -> Tensor:
        """The residual stream after these blocks."""
        if not indices:
            return x_BTD
        self.backbone.layers = nn.ModuleList(self.layers[index] for index in indices)
        self.backbone.config.num_hidden_layers = len(indices)
        if self.types:
            self.backbone.config.layer_types = [self.types[index] for index in indices]
        return self.backbone(inputs_embeds=x_BTD, use_cache=False).last_hidden_state

    def divergences(self, tokens_BT: Tensor, counted_BT: Tensor, current: list[int]) -> Tensor:
        """Sum over counted tokens of KL(dense || without block i of `current`), for each i."""
        # States after the dense model, and before each of the current blocks
        states = [self.embed(tokens_BT)]
        hidden = [self.run(states[0], list(range(len(self.layers))))]
        for index in current[:-1]:
            states.append(self.run(states[-1], [index]))
        # States at the end without each block
        hidden += [self.run(state, current[i + 1 :]) for i, state in enumerate(states)]
        dense_ND, *others = (self.norm(x_BTD[counted_BT]) for x_BTD in hidden)
        return divergences(self.head, dense_ND, others)


def _summed(values: Tensor, device: torch.device | str) -> Tensor:
    """The sum over all processes, on the CPU."""
    if world() == 1:
        return values
    torch.distributed.all_reduce(total := values.to(device))
    return total.cpu()


@torch.no_grad()
def drop_blocks(
    folder: Path,
    calibration: Sequences,
    count: int,
    *,
    work: Path,
    key: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """The removed blocks in order, each {"block": number in the dense model, "kl": its score, "scores": {number: score}}.

    The whole model is in memory. With several processes, each holds it and computes a part of the text. The same call with
    the same `work` continues after a kill, with the same result.

    Args:
        folder: Hugging Face folder.
        calibration: Calibration text.
        count: Number of blocks to remove, less than there are.
        work: Folder for the state.
        key: Everything else that determines the result, JSON-able; a work folder of another call is refused.
        dtype: Precision of the computation; log-probabilities are float32.
        device: Device of the computation.
    """
    size = max(1, BATCH_TOKENS // calibration.tokens_ST.shape[1])
    batches = list(zip(calibration.tokens_ST.split(size), calibration.counted_ST.split(size), strict=True))
    tokens, file = int(calibration.counted_ST.sum()), work / "depth.json"
    with claimed(work, origin(folder, calibration) | key | {"dtype": str(dtype), "processes": world()}):
        # Finished rounds, and the sums over the batches of the present one
        state: dict[str, Any] = {"removed": [], "batches": 0, "sums": []}
        if file.is_file():
            state = json.loads(file.read_text(encoding="utf-8"))
        removed = state["removed"]
        if len(removed) == count:
            return removed
        blocks = _Blocks(folder, dtype, device)
        total, done = count * len(batches), len(removed) * len(batches) + state["batches"]
        with tqdm(total=total, initial=done, desc="depth", unit=" batches", disable=rank() > 0 or None, delay=2) as bar:
            while len(removed) < count:
                gone = {entry["block"] for entry in removed}
                current = [index for index in range(len(blocks.layers)) if index not in gone]
                sums = torch.tensor(state["sums"] or [0.0] * len(current), dtype=torch.float64)
                for at in range(state["batches"], len(batches), world()):
                    added = torch.zeros_like(sums)
                    if at + rank() < len(batches):
                        tokens_BT, counted_BT = (part.to(device) for part in batches[at + rank()])
                        added = blocks.divergences(tokens_BT, counted_BT, current)
                    sums += _summed(added, device)
                    state |= {"batches": at + world(), "sums": sums.tolist()}
                    if rank() == 0:
                        write_json(file, state)
                    bar.update(world())
                if not bool(sums.isfinite().all()):
                    name = str(dtype).removeprefix("torch.")
                    raise UserError(f"{folder}: logits without some blocks are not finite in {name}; use --dtype float32")
                scores = {index: score / tokens for index, score in zip(current, sums.tolist(), strict=True)}
                best = min(scores, key=scores.__getitem__)
                removed.append({"block": best, "kl": scores[best], "scores": {str(k): v for k, v in scores.items()}})
                state |= {"batches": 0, "sums": []}
                if rank() == 0:
                    write_json(file, state)
        return removed
