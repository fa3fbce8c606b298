"""The frozen target: any Hugging Face causal LM folder, run on packed rows, with taps on its hidden states.

Only the backbone runs at every position. The output head is part of `TargetHandle` and is applied to counted positions only, so
that [T, V] logits never exist at once. Left out on purpose: models whose logits are not head(backbone), such as those with
soft-caps or logit scales, are refused at load.
"""

# B batch rows  T positions  D hidden  A taps

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from trainkit.bundle import fingerprint, note_drafter_as_target
from trainkit.errors import UserError, first_lines
from trainkit.models.compressed import dense_tensors, read_scheme
from trainkit.models.documents import crosses_documents, run_documents_separately
from trainkit.models.load import (
    MODEL_ERRORS,
    check_covered,
    check_text_only,
    decoder_shape,
    has_tokenizer,
    read_config,
    read_tokenizer,
)
from trainkit.models.shape import TargetHandle, TargetShape
from trainkit.models.weights import check_finite


def end_ids(folder: str | Path, config: Any, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Token ids that end a text, ascending: the union of config, generation_config.json and tokenizer."""
    from transformers import GenerationConfig

    path, ids = Path(folder), set()
    sources = [config.eos_token_id]
    if (path / "generation_config.json").is_file():
        try:
            sources.append(GenerationConfig.from_pretrained(path).eos_token_id)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path}/generation_config.json: {first_lines(error, 1)}; fix it or remove it") from error
    if has_tokenizer(path):
        sources.append(read_tokenizer(path, trust_remote_code).eos_token_id)
    for value in sources:
        ids |= set(value) if isinstance(value, (list, tuple)) else {value}
    return tuple(sorted(ids - {None}))


def target_shape(folder: str | Path, trust_remote_code: bool = False) -> TargetShape:
    """The sizes, end ids and fingerprint of the target in `folder`; reads no weights.

    Raises:
        UserError: no readable config.json there.
    """
    config, reason = read_config(folder, trust_remote_code), ""
    try:
        check_covered(config, folder, 0)
    except UserError as error:
        reason = str(error).removeprefix(f"{folder}/config.json: ").partition(";")[0]
    return TargetShape(
        decoder=decoder_shape(config),
        end_ids=end_ids(folder, config, trust_remote_code),
        pad_id=getattr(config, "pad_token_id", None),
        fingerprint=fingerprint(folder),
        undecodable=reason,
    )


def load_model(folder: str | Path, dtype: torch.dtype, trust_remote_code: bool = False, layers: bool = True) -> Any:
    """The causal LM in a folder, after checking that all its weights exist and are finite.

    transformers fills missing weights with random values and only logs it, so that is checked here. Quantised weights become
    dense, and the model's config no longer calls them quantised. Arguments as in `FrozenTarget`.

    Raises:
        UserError: no causal LM there, or weights that are broken, missing, of another size or not finite.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    # Read the config; without layers, set their number to 0.
    options: dict[str, Any] = {"local_files_only": True}
    config = read_config(folder, trust_remote_code)
    check_text_only(config, folder)
    quantised = read_scheme(config, f"{folder}/config.json") is not None
    if quantised:  # its weights are made dense here, not by transformers
        del config.quantization_config
        tensors = dense_tensors(folder, dtype)
        weights = {name: value for name, value in tensors if layers or ".layers." not in name}
        options = {"config": config, "state_dict": weights}
    if not layers:
        options["config"] = config
        config.num_hidden_layers = 0
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = []
    # Load.
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its report repeats the errors below
    try:
        loader: Any = AutoModelForCausalLM
        if quantised:
            with torch.device("meta"):
                loader = type(loader.from_config(config, trust_remote_code=trust_remote_code))
            if (Path(folder) / "generation_config.json").is_file():
                options["generation_config"] = GenerationConfig.from_pretrained(folder)
        loaded: Any = loader.from_pretrained(
            None if quantised else folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except SafetensorError as error:
        raise UserError(f"{folder}: not complete safetensors files ({first_lines(error, 1)}); copy it again") from error
    except MODEL_ERRORS as error:
        reason = first_lines(error, 1)
        raise UserError(f"{folder}: not a causal LM that transformers can load ({reason}); give another folder") from error
    finally:
        logging.set_verbosity(level)
    # Check that all weights exist, fit and are finite.
    model, report = loaded
    if report["mismatched_keys"]:
        name, stored, required = sorted(report["mismatched_keys"])[0]
        sizes = f"{list(stored)}, but the config requires {list(required)}"
        raise UserError(f"{folder}: tensor {name!r} is {sizes}; give weights that fit config.json")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]!r}; copy all weight files")
    if layers and (unused := sorted(report["unexpected_keys"])):
        print(f"{folder}: {len(unused)} tensors are not used, the first is {unused[0]!r}")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False  # the files hold two different tensors, even if config.json calls them tied
    check_finite(model.named_parameters(), str(folder))
    return model


@torch.no_grad()
def check_head(model: Any, name: str) -> None:
    """Checks on a few tokens that a model's logits are head(backbone), as every loss here assumes.

    Raises:
        UserError: they are not (soft-caps, logit scales), or the model has no output head.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise UserError(f"{name}: {type(model).__name__} has no output head apart from its backbone; use another model")
    # Tokens from all over the vocabulary, at enough positions that a soft-cap or scale shows.
    tokens_BT = torch.linspace(0, model.config.vocab_size - 1, 16, device=head.weight.device).long().unsqueeze(0)
    try:
        logits = model(input_ids=tokens_BT, use_cache=False).logits.float()
    except torch.OutOfMemoryError:
        raise
    except (
        RuntimeError
    ) as error:  # values of config.json that fit the weights but are inconsistent, such as partial_rotary_factor 0
        raise UserError(
            f"{name}: the forward pass of the model fails ({first_lines(error, 1)}); fix its config.json"
        ) from error
    rebuilt = head(model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state).float()
    error = (logits - rebuilt).abs().max().item() if logits.shape == rebuilt.shape else float("inf")
    if not error <= 1e-3 * max(logits.abs().max().item(), 1.0):
        raise UserError(
            f"{name}: its logits are not output head(backbone), they differ by {error:.3g} (soft-cap or logit scale?); "
            "use another model, since such models cannot be trained or distilled from"
        )


class FrozenTarget:
    """A causal LM in eval mode and without gradients.

    It is not an nn.Module, so that a LightningModule that holds it does not register its parameters, save them or set their
    train mode.

    Args:
        folder: Hugging Face folder on this machine.
        dtype: Precision of the weights; under bf16 autocast float32 weights compute in bfloat16, as any other layer does.
        trust_remote_code: Whether to run model code that the folder carries.
        layers: Whether to load the decoder layers; without them the target has a `handle` but cannot run.

    Raises:
        UserError: no model there, its layers or head are not under the usual names; or its logits are not
            head(backbone).
    """

    frozen = True
    """Whether `forward` runs without gradients; a tuned target's runs with them where gradients are enabled."""
    one_document_per_row: bool
    """Whether `forward` runs packed documents one per row, because the model cannot separate them within a row."""

    def __init__(
        self, folder: str | Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False, layers: bool = True
    ) -> None:
        note_drafter_as_target(folder)
        model = load_model(folder, dtype, trust_remote_code, layers)
        self._read_from(model.requires_grad_(False).eval(), folder, trust_remote_code, layers)

    def _read_from(self, model: Any, folder: str | Path, trust_remote_code: bool, layers: bool = True) -> None:
        """Sets everything that the target reads from a transformers model in eval mode; its weights came from `folder`."""
        self.folder, self._trust = Path(folder), trust_remote_code
        self.config = read_config(folder, trust_remote_code)
        self.model: nn.Module = model
        self.backbone: nn.Module = model.base_model
        self._embedding: Any = model.get_input_embeddings()
        self._head: Any = model.get_output_embeddings()
        check_head(model, str(folder))
        self._layers = self._find_layers() if layers else nn.ModuleList()
        self.one_document_per_row = layers and crosses_documents(self.backbone, str(folder))

    @property
    def device(self) -> torch.device:
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the hidden states."""
        return self._embedding.weight.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self._head.weight.shape[1])

    @property
    def num_layers(self) -> int:
        """Number of decoder layers; also the index of the hidden state after the final norm."""
        return int(self.config.num_hidden_layers)

    def to(self, device: torch.device | str) -> FrozenTarget:
        """Moves the weights to `device`; returns the target."""
        if self.device != torch.device(device):
            self.model.to(device)
        return self

    def shard(self, device: torch.device | str) -> FrozenTarget:
        """Moves the target to `device` and shards its decoder layers over all processes; returns the target.

        Each layer's weights are gathered while it computes. That is a collective operation, so all processes must run the
        target equally often. Embedding, final norm and head are not sharded, because drafters call them directly.
        Rajbhandari et al. 2020, arXiv 1910.02054 (stage 3), by torch's fully_shard.

        Raises:
            UserError: there is no process group.
        """
        from torch.distributed import get_world_size, init_device_mesh, is_initialized
        from torch.distributed.fsdp import fully_shard

        if not is_initialized():
            raise UserError("model.target_shard: fsdp shards the target over processes; start several, or set it to none")
        mesh = init_device_mesh(torch.device(device).type, (get_world_size(),))
        for layer in self._layers:
            fully_shard(layer, mesh=mesh)
        sharded = {parameter for layer in self._layers for parameter in layer.parameters()}
        whole = {parameter for parameter in self.model.parameters() if parameter not in sharded}
        for parameter in whole:
            parameter.data = parameter.data.to(device)
        fully_shard(self.backbone, mesh=mesh, ignored_params=whole)  # type: ignore[arg-type]
        return self

    def shape(self) -> TargetShape:
        """Sizes, end ids and fingerprint, which a drafter is built from."""
        return target_shape(self.folder, self._trust)

    def handle(self) -> TargetHandle:
        """The embedding and output head of the loaded model.

        Embeddings are rows of the stored weight, without the factor by which some models (Gemma) multiply them: programs that
        serve a drafter pass it these rows too.
        """
        embed = partial(F.embedding, weight=self.embedding_weight)
        return TargetHandle(embed, self._logits, vocab_size=self._head.weight.shape[0])

    @property
    def embedding_weight(self) -> Tensor:
        """The token embedding [V, D]."""
        return self._embedding.weight

    @property
    def head_weight(self) -> Tensor:
        """The output head [V, D]; a head's bias is left out."""
        return self._head.weight

    @torch.no_grad()
    def norm_weight(self) -> Tensor:
        """[D] factors of the final norm, as the weight of an RMSNorm; ones if the backbone does not end with a norm.

        They are measured, because names differ and some norms multiply by 1 + w. For x = 1024, -1024, 1024, ... the output is
        the factor times the sign of x, and epsilon is negligible. The bias of a LayerNorm cancels in norm(x) - norm(-x).
        """
        calls: list[tuple[nn.Module, Any]] = []
        inside = {module for layer in self._layers for module in layer.modules()}
        outside = [module for module in self.backbone.modules() if module not in inside and "Norm" in type(module).__name__]
        hooks = [module.register_forward_hook(lambda module, _, output: calls.append((module, output))) for module in outside]
        last = self.backbone(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)[0]
        for hook in hooks:
            hook.remove()
        x_D = torch.full((self.hidden_size,), 1024.0, dtype=self.dtype, device=self.device)
        x_D[1::2] *= -1
        for module, output in reversed(calls):
            if output.data_ptr() == last.data_ptr():
                return (module(x_D) - module(-x_D)).float() / 2 * x_D.sign()
        return torch.ones_like(x_D, dtype=torch.float32)

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, document_BT: Tensor, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states after the final norm [B, T, D], and the tapped hidden states [B, T, A, D] (None without taps).

        Rows are packed: `positions_BT` restarts at 0 with each document, and transformers derives the exact block-diagonal
        causal mask from that, but only without a cache and without an attention_mask. Padding follows the last document of a
        row (`document_BT` is -1 there), where the causal mask hides it from every counted position. For architectures that do
        not separate documents (`one_document_per_row`), each document runs alone, and states at padding are 0.

        Args:
            tokens_BT: Token ids.
            positions_BT: Positions within the document.
            document_BT: Document numbers, ascending within a row, -1 for padding at the end.
            taps: Indices of Hugging Face `hidden_states`: 0 the embeddings, i after i layers, the last (or -1) after the norm.
        """
        assert tokens_BT.shape == positions_BT.shape == document_BT.shape and len(self._layers) == self.num_layers
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.one_document_per_row:
                states = run_documents_separately(partial(self._states, taps), tokens_BT, document_BT)
            else:
                states = self._states(taps, tokens_BT, positions_BT)
            last_BTD, *tapped = states.split(states.shape[-1] // (1 + len(taps)), -1)
            return last_BTD, torch.stack(tapped, dim=2) if taps else None

    def _states(self, taps: Sequence[int], tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """The last and the tapped hidden states side by side, [B, T, (1 + A) D]."""
        with self._recorded(taps) as states:
            output = self.backbone(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False)
            states[len(self._layers)] = output.last_hidden_state
            return torch.cat([output.last_hidden_state, *(states[self.layer(tap)] for tap in taps)], -1)

    def layer(self, tap: int) -> int:
        """The number of layers before a tap; -1 gives `num_layers`.

        Raises:
            UserError: the target has no such hidden state.
        """
        count = self.num_layers + 1
        if not -count <= tap < count:
            raise UserError(f"tap {tap}: {self.folder} has hidden states 0 to {count - 1}; choose among these")
        return tap % count

    @contextmanager
    def _recorded(self, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        # Hooks instead of output_hidden_states, because these keep only the tapped states in memory, not one per layer.
        states: dict[int, Tensor] = {}

        def record(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
                states[index] = args[0] if args else kwargs["hidden_states"]

            return hook

        indices = {self.layer(tap) for tap in taps} - {len(self._layers)}
        hooks = [self._layers[index].register_forward_pre_hook(record(index), with_kwargs=True) for index in indices]
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def _logits(self, hidden: Tensor) -> Tensor:
        weight: Tensor = self._head.weight
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)  # a float32 drafter may share the head of a bfloat16 target
        return self._head(hidden)

    def _find_layers(self) -> nn.ModuleList:
        count = self.config.num_hidden_layers
        for module in self.backbone.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        raise UserError(
            f"{self.folder}: found no list of {count} decoder layers in {type(self.backbone).__name__}; use another model"
        )


class LiveTarget(FrozenTarget):
    """The present state of a causal LM that somebody else trains: its own modules, no copy of weights.

    Of a peft model that is the base model with its adapter on. `forward` runs in eval mode and without gradients, and embedding
    and head are detached: a drafter's loss leaves no gradient in the model. Left out on purpose: models whose parameters are
    sharded (FSDP, ZeRO), because only parts of the model run here.

    Args:
        model: A transformers causal LM, or a peft model of one.
        folder: Hugging Face folder that its weights came from.
        trust_remote_code: Whether to run model code that the folder carries.

    Raises:
        UserError: as in `FrozenTarget`.
    """

    def __init__(self, model: Any, folder: str | Path, trust_remote_code: bool = False) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        with evaluating(base):
            self._read_from(base, folder, trust_remote_code)

    @property
    def embedding_weight(self) -> Tensor:
        return self._embedding.weight.detach()

    @property
    def head_weight(self) -> Tensor:
        return self._head.weight.detach()

    def norm_weight(self) -> Tensor:
        with evaluating(self.model):
            return super().norm_weight()

    def forward(
        self, tokens_BT: Tensor, positions_BT: Tensor, document_BT: Tensor, taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        with evaluating(self.model):
            return super().forward(tokens_BT, positions_BT, document_BT, taps)

    @contextmanager
    def overheard(self, taps: Sequence[int]) -> Iterator[list[Tensor]]:
        """Detached hidden states of a forward pass that somebody else runs over the model while the context is open.

        Yields a list to which the pass adds the states after the final norm [B, T, D] and, if there are taps, the tapped ones
        [B, T, A, D].
        """
        heard: list[Tensor] = []

        def record(module: nn.Module, args: Any, output: Any) -> None:
            states[len(self._layers)] = output.last_hidden_state
            heard.append(output.last_hidden_state.detach())
            if taps:
                heard.append(torch.stack([states[self.layer(tap)].detach() for tap in taps], dim=2))

        with self._recorded(taps) as states:
            hook = self.backbone.register_forward_hook(record)
            try:
                yield heard
            finally:
                hook.remove()

    def _logits(self, hidden: Tensor) -> Tensor:
        weight, bias = self.head_weight, self._head.bias
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(weight.dtype)
        return F.linear(hidden, weight, None if bias is None else bias.detach())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While the context is open the model is in eval mode; afterwards each of its modules is in its mode of before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
