"""The contract between a drafter and the rest of trainkit: its inputs, its outputs, and how its kind is found.

A drafter proposes continuations of a frozen target. Only `drafters/<kind>/` knows a kind by name; trainer, exporter and runner
use the classes below. Kinds are the sub-packages of `trainkit.drafters` and of every package registered with `add_kinds_from`.
Each exports exactly one `Drafter` subclass from its `__init__`, and the name of the package is the name of the kind.
"""

# B batch rows  T positions  V target vocabulary  K draft vocabulary  D hidden size  A taps  N flattened tokens
# F frontier nodes  M numbered nodes of a round, root included  P nodes of a path, root included (depth + 1)

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainkit.bundle import MANIFEST, Bundle
from trainkit.errors import UserError
from trainkit.layers.blocks import Decoder
from trainkit.layers.linear import weight_bytes
from trainkit.layers.visible import Visible
from trainkit.layers.vocabulary import checked_vocab, trim_rows
from trainkit.losses.chunked import HeadRows
from trainkit.losses.output import LossOutput, by_head
from trainkit.models.compressed import WeightScheme
from trainkit.models.load import note_other_tokenizer
from trainkit.models.packed import load_network
from trainkit.models.shape import TargetHandle, TargetShape
from trainkit.models.target import FrozenTarget

State: TypeAlias = dict[str, Tensor]
"""A drafter's static tensors. The first axis is ALWAYS the batch: the runner takes views `tensor[a:b]` and copies rows."""


Divergence: TypeAlias = Callable[..., LossOutput]
"""Compares draft and target over N flattened tokens; arguments as in `losses.chunked.ChunkedDivergence.__call__`."""

QUANTISED = "weights"
"""Key of a bundle's `extra`: how the linear layers are stored, if they are quantised; the fields of `WeightScheme`."""
WIDEST = 256
"""Maximum number of nodes on one tree level, for drafters with a state per node for the next level."""


@dataclass(frozen=True)
class DraftBatch:
    """One packed micro-batch together with the teacher's outputs for it.

    Attributes:
        tokens_BT: Token ids, int64.
        positions_BT: Positions, restarting at 0 with each document.
        document_BT: Document number within the row, ascending; -1 marks padding. No attention crosses documents.
        mask_BT: True where the token at t counts AS A LABEL (an assistant token).
        taps_BTAD: The target's hidden states named by `Drafter.taps`; None if it names none.
        hidden_BTD: Teacher output, only for the divergence and always with `teacher_head`: the target's last hidden state after
            the final norm, or top-k rows of `losses.topk` instead. A kind that reads the last hidden state names tap -1.
        handle: The target's embedding and head.
        stored_head: Reads `hidden_BTD` if that contains top-k rows; otherwise None.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    document_BT: Tensor
    mask_BT: Tensor
    taps_BTAD: Tensor | None
    hidden_BTD: Tensor
    handle: TargetHandle
    stored_head: Any = None

    @classmethod
    def read(cls, teacher: Any, batch: Mapping[str, Tensor], taps: Sequence[int], store: Any = None) -> DraftBatch:
        """A batch of the loader with the teacher's outputs for it.

        Args:
            teacher: A `data.teacher.live.Teacher`: runs the target, or reads stored outputs.
            batch: `tokens_BT`, `positions_BT`, `document_BT` and `mask_BT`; `rows_B` too if there is a store.
            taps: The drafter's `taps`.
            store: What `teacher.store` returned for this set, or None.
        """
        hidden_BTD, taps_BTAD = teacher.read(batch, taps, store)
        inputs = {name: batch[name] for name in ("tokens_BT", "positions_BT", "document_BT", "mask_BT")}
        outputs = {"taps_BTAD": taps_BTAD, "hidden_BTD": hidden_BTD}
        return cls(**inputs, **outputs, handle=teacher.handle(), stored_head=teacher.stored_head())

    @property
    def teacher_head(self) -> Any:
        """Maps `hidden_BTD` to teacher logits. For a kind's own hidden states use `handle.head` instead."""
        return self.handle.head if self.stored_head is None else self.stored_head

    def label_mask(self, offset: int = 1) -> Tensor:
        """[B, T] bool: the token at t + offset counts as a label and is in the same document as the token at t."""
        mask = torch.zeros_like(self.mask_BT)
        if self.tokens_BT.shape[1] > offset:
            same = self.document_BT[:, offset:] == self.document_BT[:, :-offset]
            mask[:, :-offset] = self.mask_BT[:, offset:] & same & (self.document_BT[:, offset:] >= 0)
        return mask

    def heads_loss(
        self,
        divergence: Divergence,
        hidden: Sequence[Tensor],
        head: Any,
        counted: Sequence[tuple[Tensor, int]],
        ids_K: Tensor | None,
        decay: float,
        target_in_ids: bool = False,
    ) -> LossOutput:
        """The sum over heads i of decay^i * (loss of head i); each target row is computed once for all heads.

        Args:
            divergence: The loss.
            hidden: Draft hidden states [N, D] of each head, at the positions that it counts.
            head: Projection of all heads, or a list of one for each.
            counted: For each head the mask [B, T] of these positions, and how far after them the predicted token is.
            ids_K: Token ids of the columns; None for all.
            decay: Weight of each head relative to the head before it.
            target_in_ids: Whether positions count only where the target's likeliest token is in `ids_K`.
        """
        index_N = torch.cat([mask_BT.flatten().nonzero().squeeze(-1) + ahead - 1 for mask_BT, ahead in counted])
        rows = HeadRows([len(hidden_ND) for hidden_ND in hidden], index_N, decay, target_in_ids)
        # `index_N` is the position before the predicted token
        labels_N = self.tokens_BT.flatten().roll(-1)[index_N]
        target_ND = self.hidden_BTD.flatten(0, 1)
        output = divergence(torch.cat(list(hidden)), head, target_ND, self.teacher_head, ids_K, labels_N=labels_N, rows=rows)
        return by_head(output, counted)

    def training_targets(self, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """What to compare with a prediction, made at position t, of the token at t + offset.

        Returns:
            counted_BT: `label_mask(offset)`, True at the N positions t whose prediction counts.
            target_ND: Teacher output from which `teacher_head` predicts the token at t + offset.
            labels_N: The token at t + offset.
        """
        counted_BT = self.label_mask(offset)
        return counted_BT, self.hidden_BTD.roll(1 - offset, 1)[counted_BT], self.tokens_BT.roll(-offset, 1)[counted_BT]


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of a text for the drafter to read: part of a prompt, or tokens decoded while drafting was paused.

    Attributes:
        tokens_BT: Token ids.
        next_BT: The token that follows each; after the last token of a prompt that is the first root.
        positions_BT: Absolute positions, consecutive. The first is 0 at the start of a text; otherwise the chunk continues
            where the last one, or the last `commit` or `resume`, ended.
        taps_BTAD: The target's hidden states there, as named by `Drafter.taps`; None if it names none.
        continues: Whether the rows have read text before; if so no row starts at position 0, otherwise all rows do.
        counts_B: Number of tokens of each row, at least 1, if rows differ. The rest is padding, whose cache entries are
            overwritten before they are read. None without padding; always None for kinds that are not `resumable`.
    """

    tokens_BT: Tensor
    next_BT: Tensor
    positions_BT: Tensor
    taps_BTAD: Tensor | None = None
    continues: bool = False
    counts_B: Tensor | None = None

    def last(self, values: Tensor) -> Tensor:
        """[B, 1, ...]: the entry of `values` [B, T, ...] at the last token of each row."""
        if self.counts_B is None:
            return values[:, -1:]
        index = (self.counts_B - 1).view(-1, *[1] * (values.dim() - 1))
        return values.gather(1, index.expand(-1, 1, *values.shape[2:]))


@dataclass(frozen=True)
class Frontier:
    """The nodes of one level of this round's draft that `Drafter.step` expands.

    Attributes:
        tokens_BF: Their tokens; at depth 0 only the root, the last emitted token.
        positions_BF: Their absolute positions: root position + depth.
        nodes_F: Their numbers within the round, 0 for the root, ascending by level; the scratch slot of node i is root
            position + i. Constant while a CUDA graph is reused, even if the draft decides which token a number belongs to (a
            dynamic tree).
        parent_index_BF: Index of each parent within the previous level's frontier; 0 for the root.
        bits_BFW: Words of 64 bits, set at the numbers of a node's ancestors and its own (layers/visible.py). In a dynamic tree
            only expanded nodes have a number. None if the draft is a chain: cache slots equal positions, and a node sees every
            slot up to its own.
        depth: Depth of this level, a Python integer that is fixed at capture.
    """

    tokens_BF: Tensor
    positions_BF: Tensor
    nodes_F: Tensor
    parent_index_BF: Tensor
    bits_BFW: Tensor | None
    depth: int

    @classmethod
    def chain(cls, tokens_B1: Tensor, positions_B1: Tensor, depth: int) -> Frontier:
        """The node at `depth` of a chain, the root at depth 0; its position is absolute."""
        node_1 = torch.full((1,), depth, device=positions_B1.device)
        return cls(tokens_B1, positions_B1, node_1, torch.zeros_like(positions_B1), None, depth)

    @property
    def is_chain(self) -> bool:
        """Whether the draft is a chain."""
        return self.bits_BFW is None

    @property
    def root_B(self) -> Tensor:
        """Absolute position of each row's root."""
        return self.positions_BF[:, 0] - self.depth

    @property
    def slots_BF(self) -> Tensor:
        """Cache slots of the nodes, for a drafter that caches the token at position t in slot t."""
        return self.positions_BF if self.is_chain else self.root_B[:, None] + self.nodes_F

    def visible(self, root_slot: int = 0) -> Visible:
        """The slots that the nodes attend to: the root's slot is its position + `root_slot`; the others follow by number."""
        first_B = self.positions_BF[:, 0] if self.is_chain else self.root_B
        return Visible((first_B + root_slot).int(), self.bits_BFW)

    def gather_parents(self, level: Tensor) -> Tensor:
        """[B, F, ...]: for each node the entry of its parent in `level` [B, F', ...], the values of the level above."""
        index = self.parent_index_BF.view(*self.parent_index_BF.shape, *[1] * (level.dim() - 2))
        return level.gather(1, index.expand(-1, -1, *level.shape[2:]))


@dataclass(frozen=True)
class StepOutput:
    """What one draft level proposes.

    Attributes:
        logits_BFK: Draft logits of each frontier node's children.
        ids_K: Token ids of the K columns; None if K is the whole vocabulary.
        hidden_BFD: A hidden state per node, for acceptance predictors.
    """

    logits_BFK: Tensor
    ids_K: Tensor | None
    hidden_BFD: Tensor


@dataclass(frozen=True)
class Accepted:
    """The accepted path of a round, root first; on the P axis, entries at or past `counts_B` are undefined.

    Attributes:
        path_BP: Node numbers along the path, as in `Frontier`. The last node may never have been expanded: nothing was written
            to the slot of its number. None if the draft was a chain: node numbers are depths, and no cache entry has to move.
        tokens_BP: Tokens of the path.
        next_BP: The token that follows each; the last of them is the next root.
        counts_B: Nodes of the path, root included, 1..P; 0 for a finished row, whose state must not change.
        root_B: Absolute position of the root.
        taps_BPAD: The target's hidden states at these nodes, as named by `Drafter.taps`; None if it names none.
    """

    path_BP: Tensor | None
    tokens_BP: Tensor
    next_BP: Tensor
    counts_B: Tensor
    root_B: Tensor
    taps_BPAD: Tensor | None = None

    @property
    def positions_BP(self) -> Tensor:
        """Absolute positions of the path's nodes."""
        return self.root_B[:, None] + torch.arange(self.tokens_BP.shape[1], device=self.root_B.device)

    def last(self, values: Tensor, unchanged: Tensor) -> Tensor:
        """[B, 1, ...]: the entry of `values` [B, P, ...] at the last accepted node; in a finished row that of `unchanged`."""
        counts = self.counts_B.view(-1, *[1] * (values.dim() - 1))
        index = (counts - 1).clamp(min=0).expand(-1, 1, *values.shape[2:])
        return torch.where(counts > 0, values.gather(1, index), unchanged)


class Drafter(nn.Module, ABC):
    """Proposes continuations of a frozen target. Hyper-parameters are plain constructor arguments after `target`.

    Args:
        target: Sizes of the target.
        draft_vocab: Token ids it may propose, ascending, or a JSON file of them (`trainkit vocab`); all by default.

    Serving works on a `State`. At the start of a round the target has cached the tokens before the root; the root is the last
    emitted token. A round calls `step` once per level, then `commit` with the path that the target accepted. Neither may read a
    tensor on the host: a round can be captured in a CUDA graph. `span` is a bound known on the host: no cache slot at or past
    it is in use. Only attention with a bias reads it, over that many slots.

    Attributes:
        taps: Hidden states of the target that it reads, as indices of Hugging Face `hidden_states` (0 the embeddings, i after i
            layers; the last index, also -1, is after the final norm); () for none.
        default_tree: Rank paths of the tree that it drafts if none is requested; None for a chain. A bundle may recommend
            another.
        resumable: `prefill` may begin at any position of a row that has read the same text up to there, even if the row has
            since read more, drafted and committed: entries above that position are not read. The runner calls `resume`
            first.
        max_depth: Maximum number of levels it can draft; None for no limit.
        max_width: Maximum number of nodes it can expand on one level; None for no limit.
        ids_K: Token ids it may propose, ascending; None for all.
        formats: Format of `trainkit export --format` -> layout of files that this kind writes for it.
        names_target: Layouts whose files record where the target is: `target_name`, or the target's folder if that is None.
        target_name: Folder or hub name of the target to record.
    """

    formats: ClassVar[Mapping[str, str]] = {"native": "native"}
    names_target: ClassVar[frozenset[str]] = frozenset()
    target_name: str | None = None
    taps: tuple[int, ...] = ()
    resumable: ClassVar[bool] = False
    max_depth: int | None = None
    max_width: int | None = None
    default_tree: tuple[tuple[int, ...], ...] | None = None

    def __init__(self, target: TargetShape, draft_vocab: list[int] | str | None = None) -> None:
        super().__init__()
        self.target = target
        self.register_buffer("ids_K", checked_vocab(draft_vocab, target.decoder.vocab_size), persistent=False)
        self.ids_K: Tensor | None

    @property
    def draft_vocab(self) -> list[int] | None:
        """Token ids it may propose, ascending; None for all."""
        return None if self.ids_K is None else self.ids_K.tolist()

    @property
    def draft_vocab_size(self) -> int:
        """Number of token ids it may propose."""
        return self.target.decoder.vocab_size if self.ids_K is None else len(self.ids_K)

    # Training

    def initialise(self, target: FrozenTarget) -> None:
        """Copies what starts as the target's weights; the trainer calls it once, before the first step of a fresh run."""

    @abstractmethod
    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        """The training loss as sums. It is computed in `forward` so that ZeRO-3 and FSDP gather the weights here."""

    # Serving

    @abstractmethod
    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        """Zeroed static tensors for `batch_size` rows of `slots` cache slots."""

    @abstractmethod
    def prefill(self, state: State, chunk: Chunk, handle: TargetHandle, span: int) -> None:
        """Reads a chunk of text into `state`: a prompt, chunk by chunk, or tokens decoded since the last round with a draft.

        Reading tokens later must leave the state that drafting would have left. Unlike `step` and `commit` it is never captured
        in a CUDA graph.
        """

    def resume(self, state: State, previous_B1: Tensor) -> None:
        """Sets rows back to a position of their text, where `prefill` continues; `previous_B1` are the tokens before it.

        Needed for `resumable` kinds whose state holds more of the earlier text than their cache.
        """

    @abstractmethod
    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        """Expands one level of the draft."""

    @abstractmethod
    def commit(self, state: State, accepted: Accepted, handle: TargetHandle, span: int) -> None:
        """Updates `state` in place to the accepted path: retains its cache entries (lm), or makes new ones from the target's
        hidden states (eagle, hydra++).
        """

    def standalone_decoder(self) -> Decoder | None:
        """The decoder that writes text without the target, for on-policy data; None for kinds that need the target."""
        return None

    def step_bytes(self, head_bytes: int) -> int:
        """Bytes of weights that one draft step reads; for the metric mbsu.

        Args:
            head_bytes: Bytes of the target's output head, for drafters whose step reads it.
        """
        return weight_bytes(self)

    @torch.no_grad()
    def copy_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies new weights, a `state_dict`, into the present ones in place, casting to their dtype; graphs stay valid."""
        for name, weight in self.state_dict().items():
            weight.copy_(tensors[name])

    # Files

    def config(self) -> dict[str, Any]:
        """Constructor arguments after `target`, JSON-able, that rebuild this drafter's shape: its attributes of these names."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters if name != "target"}

    def fill_untrained(self) -> None:
        """Replaces weights that were not trained because the vocabulary is trimmed; called before a checkpoint is exported.

        For kinds whose files contain the whole head.
        """

    def use_target_folder(self, folder: Path) -> None:
        """Receives the folder of the target before an export, if it is known; for kinds whose files contain parts of it."""

    def export(self, folder: Path, dtype: torch.dtype, layout: str = "native") -> None:
        """Writes the weights into `folder` in `dtype`, in one of the layouts of `formats`; `load` recognises the layout."""
        save_file(self.file_tensors(dtype), folder / "model.safetensors", {"format": "pt"})

    def file_tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The `state_dict` in `dtype`, and the ids of a trimmed vocabulary as `token_map`."""
        tensors = {name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}
        return tensors if self.ids_K is None else tensors | {"token_map": self.ids_K.clone()}

    def check_format(self, format: str) -> None:
        """Refuses a requested format of `formats` whose readers would not load or compute this drafter as configured.

        Raises:
            UserError: they would not; the message names the setting.
        """

    def layout_shapes(self, layout: str) -> Mapping[str, tuple[int, ...]] | None:
        """Name -> shape of each tensor that other programs expect in model.safetensors; None if only trainkit reads the layout.

        Computed from the configuration alone, never from `state_dict`: the exporter compares the written file with it.
        """
        return None

    @classmethod
    def claims(cls, folder: Path) -> bool:
        """Whether this kind loads a folder that is not a trainkit bundle but was written by another program."""
        return False

    @classmethod
    def load(cls, folder: Path, target: TargetShape, config: Mapping[str, Any]) -> Drafter:
        """The drafter that `export` wrote, from the constructor arguments in its bundle; weights retain their dtype.

        `config` is empty for a folder that the kind `claims`: sizes are then read from its files and compared with the target.
        """
        return cls(target, **config).load_tensors(load_file(folder / "model.safetensors"))

    def load_tensors(self, tensors: dict[str, Tensor]) -> Self:
        """This drafter with the weights that `file_tensors` returned, in their dtype; a smaller vocabulary takes its rows."""
        weights = trim_rows(tensors, tensors.pop("token_map", None), self.ids_K)
        self.to(next(iter(weights.values())).dtype).load_state_dict(weights)
        return self.eval()


_PICKLES = (".pt", ".pth", ".bin", ".pkl")
_PACKAGES: list[str] = ["trainkit.drafters"]


def add_kinds_from(package: str) -> None:
    """Also discovers kinds among the sub-packages and modules of `package` (an importable name)."""
    if package not in _PACKAGES:
        _PACKAGES.append(package)
        discover.cache_clear()


@cache
def discover() -> Mapping[str, type[Drafter]]:
    """Name -> class of every drafter kind in the registered packages."""
    kinds: dict[str, type[Drafter]] = {}
    for package in _PACKAGES:
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if package == "trainkit.drafters" and not info.ispkg:
                continue
            module = importlib.import_module(f"{package}.{info.name}")
            for value in vars(module).values():
                if isinstance(value, type) and issubclass(value, Drafter) and value is not Drafter:
                    kinds[info.name] = value
    return kinds


def load_kind(kind: str) -> type[Drafter]:
    """The drafter class of a kind.

    Raises:
        UserError: unknown kind; the message lists the known ones.
    """
    if kind not in discover():
        raise UserError(f"unknown drafter kind {kind!r}; choose from {', '.join(sorted(discover()))}")
    return discover()[kind]


def kind_name(drafter: Drafter) -> str:
    """The name of a drafter's kind.

    Raises:
        UserError: its class is not a discovered kind.
    """
    for name, kind in discover().items():
        if type(drafter) is kind:
            return name
    raise UserError(f"{type(drafter).__name__} is not a known drafter kind; register its package with add_kinds_from")


def load_bundle(bundle: Bundle, target: TargetShape, packed: bool = False, **changes: Any) -> Drafter:
    """The drafter in a bundle. The caller has checked that the bundle fits the target.

    The tree that the bundle recommends (`runner.tree`, from `trainkit tree`) becomes its `default_tree`; `changes` replaces
    constructor arguments of the bundle. With `packed`, quantised weights stay as they are stored, for decoding.

    Raises:
        UserError: unknown kind, constructor arguments that the kind does not take, or a malformed recommended tree.
    """
    manifest, arguments = bundle.path / MANIFEST, {**bundle.config, **changes}
    try:
        kind = load_kind(bundle.kind)
    except UserError as error:
        raise UserError(f"{manifest}: {error}") from None
    if unknown := sorted(arguments.keys() - inspect.signature(kind).parameters.keys()):
        raise UserError(f"{manifest}: kind {bundle.kind!r} takes no argument {unknown[0]!r}; export it again")
    if weights := bundle.extra.get(QUANTISED):
        if changes:
            raise UserError(f"{bundle.path}: its weights are quantised; give the drafter that it was made from")
        drafter = kind(target, **arguments).eval()
        load_network(drafter, bundle.path / "model.safetensors", WeightScheme(**weights), packed)
    else:
        drafter = kind.load(bundle.path, target, arguments)
    tree = bundle.runner.get("tree")
    if tree is not None:
        try:
            drafter.default_tree = parse_rank_paths(tree)
        except ValueError as error:
            raise UserError(f"{manifest}: runner.tree {error}; search it again with trainkit tree") from None
    return drafter


def parse_rank_paths(tree: Any) -> tuple[tuple[int, ...], ...]:
    """The rank paths of a static tree from JSON's lists; the builder of the tree checks whether they form one.

    Raises:
        ValueError: not such lists; the message continues a sentence that begins with the name of the value.
    """
    lists = isinstance(tree, list) and all(isinstance(path, list) and path for path in tree)
    if not lists or any(type(rank) is not int for path in tree for rank in path):
        raise ValueError("must be a list of rank paths such as [[0], [1], [0, 0]]")
    return tuple(tuple(path) for path in tree)


def load_outside(folder: Path, target: TargetShape, target_folder: str | Path) -> Drafter:
    """The drafter in a folder that another program wrote, loaded by the first kind that claims it.

    A note is printed if its tokenizer is not the target's.

    Raises:
        UserError: no such folder, it holds only a pickle, no kind claims it, or it does not fit the target.
    """
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give a drafter bundle or a Hugging Face folder")
    files = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
    pickle = next((path for path in files if path.suffix in _PICKLES), None)
    if pickle is not None and not any(path.suffix == ".safetensors" for path in files):
        convert = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        raise UserError(f"{pickle}: a pickle may run code and is not read; convert it to safetensors with {convert}")
    for kind in discover().values():
        if folder.is_dir() and kind.claims(folder):
            note_other_tokenizer(folder, target_folder)
            return kind.load(folder, target, {})
    raise UserError(f"{folder}: neither a trainkit bundle (no {MANIFEST}) nor a model folder that a drafter kind reads")
