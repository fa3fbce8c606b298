"""The contract between drafters and the rest: what a drafter is given, what it returns, and how its kind is found.

A drafter proposes continuations of a frozen target. Nothing outside `drafters/<kind>/` names a kind: trainer, exporter and
runner speak to the classes below. Kinds are the sub-packages of `trainkit.drafters`, and of any package registered with
`add_kinds_from`; each has exactly one `Drafter` subclass in its `__init__`, and the kind is called as the package.
"""

# B batch rows  T positions  V target vocabulary  K draft vocabulary  D hidden  A taps  F frontier nodes
# M drafted nodes, root first
# P path length (depth + 1, root first)  N flattened tokens

from __future__ import annotations

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from trainkit.bundle import MANIFEST, Bundle
from trainkit.errors import UserError
from trainkit.layers.blocks import Decoder
from trainkit.losses.output import LossOutput
from trainkit.models.shape import TargetHandle, TargetShape

__all__ = [
    "Divergence",
    "DraftBatch",
    "Drafter",
    "Frontier",
    "LossOutput",
    "State",
    "StepOutput",
    "TargetHandle",
    "TargetShape",
    "discover",
    "kind_name",
    "load_bundle",
    "load_kind",
    "load_outside",
    "rank_paths",
]

State: TypeAlias = dict[str, Tensor]
"""A drafter's static tensors, batch ALWAYS the first axis: the runner takes rows as views `tensor[a:b]`, and copies them."""


class Divergence(Protocol):
    """Compares draft and target over N flattened tokens without holding [N, V] logits.

    Called as `divergence(draft_hidden_ND, draft_head, target_hidden_ND, target_head, ids_K=None, mask_N=None, labels_N=None)`;
    a head maps hidden states [n, D] to logits [n, V] (draft: [n, K] when `ids_K` names its trimmed vocabulary).
    """

    def __call__(
        self,
        draft_hidden_ND: Tensor,
        draft_head: Any,
        target_hidden_ND: Tensor,
        target_head: Any,
        ids_K: Tensor | None = None,
        mask_N: Tensor | None = None,
        labels_N: Tensor | None = None,
    ) -> LossOutput: ...


@dataclass(frozen=True)
class DraftBatch:
    """One packed micro-batch with what the target says of it.

    Attributes:
        tokens_BT: Token ids, int64.
        positions_BT: Positions, restarting at 0 with each document.
        document_BT: Document number within the row, ascending; -1 marks padding. No attention crosses documents.
        mask_BT: True where the token at t counts AS A LABEL (an assistant token).
        taps_BTAD: The target's hidden states named by `Drafter.taps`, or None when it names none.
        hidden_BTD: The teacher, for a divergence alone, with `teacher_head`: the target's last hidden state, after the final
            norm, or rows of `losses.topk` in its place. A kind that reads the state itself names tap -1.
        handle: The target's embedding, final norm and head.
        stored_head: Reads `hidden_BTD` where it holds such rows.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    document_BT: Tensor
    mask_BT: Tensor
    taps_BTAD: Tensor | None
    hidden_BTD: Tensor
    handle: TargetHandle
    stored_head: Any = None

    @property
    def teacher_head(self) -> Any:
        """What makes of `hidden_BTD` what the target says; `handle.head` is for a kind's own hidden states."""
        return self.handle.head if self.stored_head is None else self.stored_head

    def label_mask(self, offset: int = 1) -> Tensor:
        """[B, T] bool: position t has a counted label at t + offset in its own document."""
        mask = torch.zeros_like(self.mask_BT)
        if self.tokens_BT.shape[1] > offset:
            same = self.document_BT[:, offset:] == self.document_BT[:, :-offset]
            mask[:, :-offset] = self.mask_BT[:, offset:] & same & (self.document_BT[:, offset:] >= 0)
        return mask

    def ahead(self, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a prediction of the token `offset` places on is compared with.

        Where it counts [B, T], N positions; the teacher's row that says that token [N, D]; the token itself [N].
        """
        counted_BT = self.label_mask(offset)
        return counted_BT, self.hidden_BTD.roll(1 - offset, 1)[counted_BT], self.tokens_BT.roll(-offset, 1)[counted_BT]


@dataclass(frozen=True)
class Frontier:
    """The nodes of one level of this round's draft, about to be expanded.

    Attributes:
        tokens_BF: Their tokens; at depth 0 the root alone, the last emitted token.
        positions_BF: Their absolute positions; root_position + depth.
        nodes_F: Their numbers within the round, 0 the root, ascending by level; node i has scratch slot `root_position + i`.
            Fixed while a graph is reused, also where which token a number stands for depends on the draft (a dynamic tree).
        parents_BF: Their parents' numbers; -1 at the root.
        parent_places_BF: Where the parent stood in the previous level's frontier; 0 at the root.
        ancestors_BFM: True at a node's ancestors and itself, over the M numbers of the round; in a dynamic tree only nodes that
            are expanded have one.
        depth: This level's depth, a Python integer fixed at capture.
        chain: The tree is a chain: slots are positions, and a node sees every slot up to its own.
    """

    tokens_BF: Tensor
    positions_BF: Tensor
    nodes_F: Tensor
    parents_BF: Tensor
    parent_places_BF: Tensor
    ancestors_BFM: Tensor
    depth: int
    chain: bool


@dataclass(frozen=True)
class StepOutput:
    """What one draft level proposes.

    Attributes:
        logits_BFK: Draft logits of each frontier node's children.
        ids_K: Token ids the K columns stand for, or None when K is the whole vocabulary.
        hidden_BFD: A state per node, for acceptance predictors.
    """

    logits_BFK: Tensor
    ids_K: Tensor | None
    hidden_BFD: Tensor


class Drafter(nn.Module, ABC):
    """Proposes continuations of a frozen target. Hyper-parameters are plain constructor arguments after `target`.

    The served half works on a `State`: the target has `root_position` tokens in its cache and one more emitted, the root.
    A round is `step` for each level, then `commit` with the path the target accepted. All of it runs without reading a
    tensor on the host, so that a round can be captured in a CUDA graph.

    Attributes:
        taps: Target hidden states it needs, as indices of Hugging Face `hidden_states` (0 the embeddings, i after i layers;
            the last index, also -1, is after the final norm); () for none.
        default_tree: Rank paths of the tree it drafts when asked for none, or None for a chain; a bundle may recommend another.
        max_depth: Levels it can draft; None for any number.
        max_width: Nodes of one level it can expand; None for any number.
        formats: Formats that `trainkit export --format` may ask for -> the layout that this kind writes for it.
    """

    formats: ClassVar[Mapping[str, str]] = {"native": "native"}
    taps: tuple[int, ...] = ()
    max_depth: int | None = None
    max_width: int | None = None
    default_tree: tuple[tuple[int, ...], ...] | None = None

    def __init__(self, target: TargetShape) -> None:
        super().__init__()
        self.target = target

    def initialise(self, target_folder: Path) -> None:
        """Fills in what starts from the target's weights; the trainer calls it once, before the first step of a fresh run."""

    @abstractmethod
    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        """The training loss as sums. In `forward`, so that ZeRO-3 and FSDP gather here."""

    @abstractmethod
    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        """Zeroed static tensors for `batch_size` rows of `slots` cache slots."""

    @abstractmethod
    def prefill(
        self,
        state: State,
        tokens_BT: Tensor,
        next_BT: Tensor,
        positions_BT: Tensor,
        taps_BTAD: Tensor | None,
        handle: TargetHandle,
        span: int,
    ) -> None:
        """Reads T more tokens at consecutive positions, with the target's taps there: a prompt chunk by chunk.

        `next_BT` are the tokens that follow each; the last of a prompt's is the first root. `span` as in `step`.
        """

    def catch_up(
        self,
        state: State,
        tokens_BT: Tensor,
        next_BT: Tensor,
        positions_BT: Tensor,
        taps_BTAD: Tensor | None,
        handle: TargetHandle,
        span: int,
    ) -> None:
        """Reads what was decoded without drafting since the last round with a draft; arguments as in `prefill`."""
        self.prefill(state, tokens_BT, next_BT, positions_BT, taps_BTAD, handle, span)

    @abstractmethod
    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        """Expands one level. `span`: a host-side bound, no cache slot at or past it is in use."""

    @abstractmethod
    def commit(
        self,
        state: State,
        path_BP: Tensor | None,
        tokens_BP: Tensor,
        next_BP: Tensor,
        counts_B: Tensor,
        root_B: Tensor,
        taps_BPAD: Tensor | None,
        handle: TargetHandle,
        span: int,
    ) -> None:
        """Keeps the accepted path: its cache entries (lm) or new ones made from the target's taps (eagle, hydra++).

        Args:
            state: This drafter's tensors, changed in place.
            path_BP: Node numbers, as in `Frontier`, along the accepted path, root first; entries at or past `counts_B` are
                meaningless. The last node may be one that was never expanded: its number points at nothing that was written.
                None when the round drafted a chain: node numbers are depths, and nothing has to move.
            tokens_BP: Their tokens.
            next_BP: The token that follows each, the last of them the next root; meaningless as `path_BP`.
            counts_B: Nodes on the path, root included, 1..P; 0 for a row that is finished and keeps what it has.
            root_B: Absolute position of the root.
            taps_BPAD: The target's taps at those nodes, or None.
            handle: The target's shared parts.
            span: As in `step`.
        """

    def alone(self) -> Decoder | None:
        """The decoder that it is when it writes by itself, for on-policy data; None for kinds that need the target."""
        return None

    def step_bytes(self, head_bytes: int) -> int:
        """Bytes of weights one draft step reads, for mbsu.

        Args:
            head_bytes: Size of the target's output head, for drafters whose step reads it.
        """
        return sum(p.numel() * p.element_size() for p in self.parameters())

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Constructor arguments after `target`, JSON-able, that rebuild this drafter's shape."""

    def find_target(self, folder: Path) -> None:
        """Told, before an export, where its target lies, if that is known; for kinds whose files hold weights of it."""

    @abstractmethod
    def export(self, folder: Path, dtype: torch.dtype, layout: str = "native") -> None:
        """Writes its weights into `folder`, in one of the layouts of `formats`, in `dtype`; `load` tells layouts apart."""

    def layout_shapes(self, layout: str) -> Mapping[str, tuple[int, ...]] | None:
        """Every tensor that an outside program expects in model.safetensors, and its shape.

        Computed from the configuration alone, never from `state_dict`: the exporter holds what `export` wrote against it. None
        where the layout is ours alone.
        """
        return None

    @classmethod
    def claims(cls, folder: Path) -> bool:
        """Whether a folder that is no bundle of ours, but what an outside program wrote, loads as this kind."""
        return False

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, target: TargetShape, config: Mapping[str, Any]) -> Drafter:
        """Rebuilds from what `export` wrote and the bundle's constructor arguments; weights keep their dtype.

        A folder that it `claims` comes without any: sizes are then read off its files, the fit with the target checked.
        """


_PICKLES = (".pt", ".pth", ".bin", ".pkl")
_PACKAGES: list[str] = ["trainkit.drafters"]


def add_kinds_from(package: str) -> None:
    """Also discovers kinds among the sub-packages and modules of `package` (an importable name)."""
    if package not in _PACKAGES:
        _PACKAGES.append(package)
        discover.cache_clear()


@cache
def discover() -> Mapping[str, type[Drafter]]:
    """Every drafter kind by name, found by walking the kind packages; no list is kept by hand."""
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
        UserError: no such kind; the message lists those there are.
    """
    kinds = discover()
    if kind not in kinds:
        raise UserError(f"unknown drafter kind {kind!r}; there are: {', '.join(sorted(kinds))}")
    return kinds[kind]


def load_bundle(found: Bundle, target: TargetShape, **changes: Any) -> Drafter:
    """The drafter of a bundle, for a target whose fit was checked; `changes` go before its constructor arguments.

    The tree that the bundle recommends (`runner.tree`, from `trainkit tree`) becomes its `default_tree`.

    Raises:
        UserError: an unknown kind, arguments that it does not take, or a recommended tree that is none.
    """
    manifest, arguments = found.path / MANIFEST, {**found.config, **changes}
    try:
        kind = load_kind(found.kind)
    except UserError as error:
        raise UserError(f"{manifest}: {error}") from None
    unknown = sorted(arguments.keys() - inspect.signature(kind).parameters.keys())
    if unknown:
        raise UserError(f"{manifest}: kind {found.kind!r} takes no {unknown[0]!r}; export it again")
    drafter, tree = kind.load(found.path, target, arguments), found.runner.get("tree")
    if tree is not None:
        try:
            drafter.default_tree = rank_paths(tree)
        except ValueError as error:
            raise UserError(f"{manifest}: runner.tree is {error}; search it again") from None
    return drafter


def rank_paths(tree: Any) -> tuple[tuple[int, ...], ...]:
    """The rank paths of a static tree from JSON's lists; whether they make a tree is for whoever builds it.

    Raises:
        ValueError: it is something else; the message goes after "is".
    """
    lists = isinstance(tree, list) and all(isinstance(path, list) and path for path in tree)
    if not lists or any(type(rank) is not int for path in tree for rank in path):
        raise ValueError("no list of rank paths such as [[0], [1], [0, 0]]")
    return tuple(tuple(path) for path in tree)


def load_outside(folder: Path, target: TargetShape) -> Drafter:
    """The drafter in a folder that an outside program wrote, of the first kind that claims it.

    Raises:
        UserError: no such folder, only a pickle in it, no kind claims it, or it does not fit the target.
    """
    if not folder.exists():
        raise UserError(f"{folder}: no such folder; give a drafter bundle or a Hugging Face folder")
    files = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if path.is_file())
    pickle = next((path for path in files if path.suffix in _PICKLES), None)
    if pickle is not None and not any(path.suffix == ".safetensors" for path in files):
        convert = "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
        raise UserError(f"{pickle}: a pickle, which may run code and is not read; make safetensors of it with {convert}")
    for kind in discover().values():
        if folder.is_dir() and kind.claims(folder):
            return kind.load(folder, target, {})
    raise UserError(f"{folder}: neither a trainkit bundle (no {MANIFEST}) nor a model folder that a drafter kind reads")


def kind_name(drafter: Drafter) -> str:
    """The kind's name of a drafter.

    Raises:
        UserError: its class is no discovered kind.
    """
    for name, kind in discover().items():
        if type(drafter) is kind:
            return name
    raise UserError(f"{type(drafter).__name__} is no discovered drafter kind; register its package with add_kinds_from")
