"""Writes a trained drafter as a bundle (its kind's files, the tokenizer, trainkit.json), checked before it exists at OUT.

Left out on purpose: running the programs that the formats are for.
"""

# B batch  T positions  A taps  D hidden  V vocabulary  K draft vocabulary

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit import bundle
from trainkit.drafters.base import Chunk, Drafter, Frontier, TargetHandle, TargetShape, kind_name, load_kind
from trainkit.errors import UserError
from trainkit.export.checks import check_finite, check_reload, check_tensors, check_weights, copy_tokenizer, layout_for
from trainkit.models.load import is_hub_name


def export_drafter(
    drafter: Drafter,
    out: str | Path,
    *,
    tokenizer: str | Path,
    target: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    format: str = "native",
    verifier: str | None = None,
    extra: Mapping[str, Any] | None = None,
    **card: Any,
) -> bundle.Bundle:
    """Writes a drafter as a bundle and returns it.

    The files are compared with the format, tensor by tensor, and the logits of the reloaded drafter with those of `drafter`,
    before anything is written to `out`.

    Args:
        drafter: Trained drafter, on the CPU.
        out: Folder to write; a bundle there is replaced.
        tokenizer: Folder whose tokenizer files are copied.
        target: Folder of the target, for kinds whose files contain target weights; the tokenizer's folder by default.
        dtype: Dtype of the written weights.
        format: One of the kind's `formats`.
        verifier: Folder or hub name of the target, for layouts that record where it is; its folder by default.
        extra: Further entries of the bundle's `extra`.
        card: `metrics`, `runner`, `recipe`, `seed`, `data` for trainkit.json.

    Raises:
        UserError: weights that are not finite, a format that the drafter does not have, files that do not match the format, no
            tokenizer, a verifier that is neither folder nor hub name, or `out` is something other than a bundle.
    """
    # Refuse what cannot be exported
    kind = kind_name(drafter)
    layout = layout_for(format, drafter.formats, f"drafter of kind {kind!r}")
    drafter.check_format(format)
    shapes = drafter.layout_shapes(layout)
    if format != "native" and shapes is None:
        raise UserError(f"--format {format}: needs a head in the files, but this drafter uses its target's; leave --format out")
    if verifier is not None:
        if layout not in drafter.names_target:
            raise UserError(f"--verifier: files of --format {format} do not name the target; leave --verifier out")
        if (Path(verifier) / "config.json").is_file():
            verifier = str(Path(verifier).resolve())
        elif not is_hub_name(verifier):
            raise UserError(f"--verifier {verifier}: neither a model folder nor a hub name; give a folder, or owner/name")
    drafter.target_name = verifier
    check_finite(drafter.named_parameters())

    # Cast, and find the target if the folder is that of the target (the tokenizer may come from elsewhere)
    drafter = drafter.to(dtype).eval()
    source, fingerprint = Path(target or tokenizer), drafter.target.fingerprint or {}
    if (source / "config.json").is_file() and bundle.fingerprint(source)["config"] == fingerprint.get("config"):
        drafter.use_target_folder(source)

    # Write to a temporary folder, check it, and only then put it at `out`
    before = first_logits(drafter)

    def write_files(folder: Path) -> None:
        drafter.export(folder, dtype, layout)
        if shapes is not None:
            check_tensors(folder, shapes, dtype, str(out))
        copy_tokenizer(Path(tokenizer), folder)
        reloaded = load_kind(kind).load(folder, drafter.target, drafter.config()).to(dtype)
        check_reload(before, first_logits(reloaded), out)
        check_weights(drafter.state_dict(), reloaded.state_dict(), out)

    extra = {"taps": list(drafter.taps), "format": format, "layout": layout if shapes else "native"} | dict(extra or {})
    config, shape = drafter.config(), drafter.target.to_dict()
    return bundle.write(out, write_files, kind=kind, config=config, target=shape, extra=extra, **card)


@torch.inference_mode()
def first_logits(drafter: Drafter) -> Tensor:
    """Logits [levels, K], float32, of a drafter's first round after a fixed prompt, over a stand-in target with random taps.

    Two levels, or `max_depth`. Deterministic: two drafters with equal weights give equal logits.
    """
    # A fixed prompt
    shape, T = drafter.target.decoder, 8
    parameter = next(drafter.parameters())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (1, T + 1), generator=generator)
    taps = None
    if drafter.taps:
        taps = torch.randn(1, T, len(drafter.taps), shape.hidden_size, generator=generator).to(parameter.dtype)
    state = drafter.init_state(1, 64, parameter.device, parameter.dtype)
    handle = _stand_in(drafter.target, parameter.dtype)
    drafter.prefill(state, Chunk(tokens[:, :T], tokens[:, 1:], torch.arange(T)[None], taps), handle, T)
    # A greedy chain
    token, logits, levels = tokens[:, T:], [], drafter.max_depth or 2
    for depth in range(levels):
        frontier = Frontier.chain(token, torch.tensor([[T + depth]]), depth)
        logits.append(drafter.step(state, frontier, handle, 64).logits_BFK[0].float())
        token = logits[-1].argmax(-1, keepdim=True)  # the column itself, used as a token id even for a trimmed vocabulary
    return torch.cat(logits)


def _stand_in(target: TargetShape, dtype: torch.dtype) -> TargetHandle:
    """A handle with the target's sizes, whose embedding and head are fixed functions, computed only when they are called."""
    shape = target.decoder

    def embed(ids: Tensor) -> Tensor:
        phase = ids[..., None].double() * 0.618 + torch.arange(shape.hidden_size).double()
        return phase.sin().to(dtype)

    def head(hidden: Tensor) -> Tensor:
        weight = torch.randn(shape.vocab_size, shape.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
        return hidden @ weight.T

    return TargetHandle(embed, head, shape.vocab_size)
