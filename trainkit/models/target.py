"""The frozen teacher: any Hugging Face causal LM folder, run packed, with taps on its hidden states.

Only the backbone runs over every position; the output head is handed out (`TargetHandle`) and applied to counted positions,
so [T, V] logits never exist at once. Left out on purpose: models whose logits are not head(backbone), such as those with
soft-caps or logit scales, are refused at load.
"""

# B batch rows  T positions  D hidden  A taps

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.models.load import MODEL_FAULTS, check_finite, decoder_shape, first_lines, read_config, read_tokenizer
from trainkit.models.shape import TargetHandle, TargetShape

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def end_ids(folder: str | Path, config: Any, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Ids that end a text, ascending: the union of config, generation_config.json and tokenizer."""
    from transformers import GenerationConfig

    path, found = Path(folder), set()
    sources = [config.eos_token_id]
    if (path / "generation_config.json").is_file():
        try:
            sources.append(GenerationConfig.from_pretrained(path).eos_token_id)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}/generation_config.json: {first_lines(error, 1)}; mend it or remove it") from error
    if any((path / name).is_file() for name in _TOKENIZER_FILES):
        sources.append(read_tokenizer(path, trust_remote_code).eos_token_id)
    for value in sources:
        found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return tuple(sorted(found - {None}))


def target_shape(folder: str | Path, trust_remote_code: bool = False) -> TargetShape:
    """What building a drafter needs to know of the target in `folder`; reads no weights.

    Raises:
        UserError: no readable config.json there.
    """
    from trainkit.bundle import fingerprint

    config = read_config(folder, trust_remote_code)
    return TargetShape(
        decoder=decoder_shape(config),
        end_ids=end_ids(folder, config, trust_remote_code),
        pad_id=getattr(config, "pad_token_id", None),
        fingerprint=fingerprint(folder),
    )


def load_model(folder: str | Path, dtype: torch.dtype, trust_remote_code: bool = False, layers: bool = True) -> Any:
    """The causal LM in a folder, with all of its weights and only finite ones; without `layers` no decoder layer is read.

    transformers fills in what is missing with random values, and says so in a log.

    Raises:
        UserError: not such a folder, or weights that are broken, missing, of another size or not finite.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    given: dict[str, Any] = {}
    if not layers:
        given["config"] = config = read_config(folder, trust_remote_code)
        config.num_hidden_layers = 0
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = []
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of several lines says what the errors below say
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **given,
        )
    except SafetensorError as error:
        raise UserError(f"{folder}: not whole safetensors files ({first_lines(error, 1)}); copy it again") from error
    except MODEL_FAULTS as error:
        said = first_lines(error, 1)
        raise UserError(f"{folder}: not a causal LM that transformers loads ({said}); give another folder") from error
    finally:
        logging.set_verbosity(level)
    model, found = loaded
    if found["mismatched_keys"]:
        name, stored, wanted = sorted(found["mismatched_keys"])[0]
        sizes = f"{list(stored)}, the config asks for {list(wanted)}"
        raise UserError(f"{folder}: tensor {name!r} is {sizes}; give weights that fit config.json")
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}; copy all weight files")
    if layers and (unread := sorted(found["unexpected_keys"])):
        print(f"{folder}: {len(unread)} tensors are not read, the first is {unread[0]!r}")
    check_finite(model.named_parameters(), str(folder))
    return model


@torch.no_grad()
def check_head(model: Any, name: str) -> None:
    """Checks on a few tokens that a model's logits are its output head on its backbone, as every loss here assumes.

    Raises:
        UserError: they are not (soft-caps, logit scales), or there is no output head.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise UserError(f"{name}: {type(model).__name__} has no output head apart from its backbone; use another model")
    # Spread over the vocabulary; enough positions that a soft-cap or scale shows.
    tokens_BT = torch.linspace(0, model.config.vocab_size - 1, 16, device=head.weight.device).long().unsqueeze(0)
    whole = model(input_ids=tokens_BT, use_cache=False).logits.float()
    parts = head(model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state).float()
    error = (whole - parts).abs().max().item() if whole.shape == parts.shape else float("inf")
    if not error <= 1e-3 * max(whole.abs().max().item(), 1.0):
        raise UserError(
            f"{name}: its logits are not output head(backbone), they differ by {error:.3g} (soft-cap or logit scale?); "
            "such models cannot be trained or distilled from here"
        )


class FrozenTarget:
    """A causal LM in eval mode and without gradients.

    Deliberately no nn.Module: a LightningModule that holds it gets none of it into its parameters, state_dict or train mode.

    Args:
        folder: A Hugging Face folder on this machine.
        dtype: Precision of the weights; under bf16 autocast float32 weights compute in bfloat16 as any other layer does.
        trust_remote_code: Whether to run model code that the folder itself carries.
        layers: Whether to load its decoder layers; without them there is a `handle`, and nothing to run.

    Raises:
        UserError: no model there, its layers or head are not where they usually are, or its logits are not
            head(backbone).
    """

    def __init__(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False, layers: bool = True
    ) -> None:
        self.folder = Path(folder)
        self._trust = trust_remote_code
        self.config = read_config(folder, trust_remote_code)
        model = load_model(folder, dtype, trust_remote_code, layers)
        self.model: nn.Module = model.requires_grad_(False).eval()
        self.backbone: nn.Module = model.base_model
        self._embedding: nn.Module = model.get_input_embeddings()
        self._head: Any = model.get_output_embeddings()
        check_head(model, str(folder))
        self._layers = self._find_layers() if layers else nn.ModuleList()

    @property
    def device(self) -> torch.device:
        return self._embedding.weight.device  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of its hidden states."""
        return self._embedding.weight.dtype  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]

    @property
    def hidden_size(self) -> int:
        """Width of its hidden states."""
        return int(self._head.weight.shape[1])

    @property
    def num_layers(self) -> int:
        """Its decoder layers; also the index of the state after the final norm."""
        return int(self.config.num_hidden_layers)

    def to(self, device: torch.device | str) -> FrozenTarget:
        """This target, its weights on `device`."""
        if self.device != torch.device(device):
            self.model.to(device)
        return self

    def shard(self, device: torch.device | str) -> FrozenTarget:
        """This target on `device`, its decoder layers' weights spread over all processes, each gathered while it computes.

        A collective in every layer: all processes must then run it equally often. Embedding, final norm and head stay whole,
        since drafters call them by themselves. Rajbhandari et al. 2020, arXiv 1910.02054 (stage 3), by torch's fully_shard.

        Raises:
            UserError: there is no process group to spread over.
        """
        from torch.distributed import get_world_size, init_device_mesh, is_initialized
        from torch.distributed.fsdp import fully_shard

        if not is_initialized():
            raise UserError("model.target_shard: fsdp spreads the target over processes; start several, or set it to none")
        mesh = init_device_mesh(torch.device(device).type, (get_world_size(),))
        for layer in self._layers:
            fully_shard(layer, mesh=mesh)
        spread = {parameter for layer in self._layers for parameter in layer.parameters()}
        whole = {parameter for parameter in self.model.parameters() if parameter not in spread}
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        fully_shard(self.backbone, mesh=mesh, ignored_params=whole)  # type: ignore[arg-type]
        return self

    def shape(self) -> TargetShape:
        """What building a drafter needs to know of it."""
        return target_shape(self.folder, self._trust)

    def handle(self) -> TargetHandle:
        """Its embedding and output head, live."""
        return TargetHandle(self._embedding, self._logits, vocab_size=self._head.weight.shape[0])

    @torch.no_grad()
    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, document_BT: Tensor, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """The last hidden state [B, T, D] after the final norm, and the taps [B, T, A, D] (None when none are named).

        Packed: `positions_BT` restarts at 0 with each document, and transformers derives the block-diagonal causal mask from
        that, exactly but only without a cache and without an attention_mask. Padding comes after the last document of a row
        (`document_BT` is -1 there), where a causal mask hides it from every counted position.

        Args:
            tokens_BT: Token ids.
            positions_BT: Positions within the document.
            document_BT: Document numbers, ascending within a row, -1 for padding at the end.
            taps: Indices of Hugging Face `hidden_states`: 0 the embeddings, i after i layers, the last (or -1) after the norm.
        """
        return self._states(tokens_BT, positions_BT, document_BT, taps)

    __call__ = forward

    def _states(
        self, tokens_BT: Tensor, positions_BT: Tensor, document_BT: Tensor, taps: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        assert tokens_BT.shape == positions_BT.shape == document_BT.shape and len(self._layers) == self.num_layers
        with self._recorded(taps) as states:
            output = self.backbone(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False)
        states[len(self._layers)] = output.last_hidden_state
        if not taps:
            return output.last_hidden_state, None
        return output.last_hidden_state, torch.stack([states[self.layer(tap)] for tap in taps], dim=2)

    def layer(self, tap: int) -> int:
        """After how many layers a tap is: -1 is `num_layers`.

        Raises:
            UserError: it has no such hidden state.
        """
        count = self.num_layers + 1
        if not -count <= tap < count:
            raise UserError(f"tap {tap}: {self.folder} has hidden states 0 to {count - 1}")
        return tap % count

    @contextmanager
    def _recorded(self, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        # Hooks instead of output_hidden_states: only the tapped states stay alive, not one for each layer.
        states: dict[int, Tensor] = {}

        def keep(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
                states[index] = args[0] if args else kwargs["hidden_states"]

            return hook

        wanted = {self.layer(tap) for tap in taps} - {len(self._layers)}
        hooks = [self._layers[index].register_forward_pre_hook(keep(index), with_kwargs=True) for index in wanted]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def _logits(self, hidden: Tensor) -> Tensor:
        weight: Tensor = self._head.weight
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)  # a float32 draft may share the head of a bfloat16 target
        return self._head(hidden)

    def _find_layers(self) -> nn.ModuleList:
        count = self.config.num_hidden_layers
        for module in self.backbone.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise UserError(f"{self.folder}: found no list of {count} decoder layers in {type(self.backbone).__name__}")
