"""The walk over a model's blocks with calibration text, one block in memory at a time; it continues after an interruption.

The hidden states of all calibration sequences lie in two files: the states before the current block are read from one while
those after it are written to the other. Peak memory is one block, the statistics of its inputs, and a few sequences. A block is
computed by a transformers model of one layer, so attention masks, rotary positions and sliding windows are those of
transformers.
"""

# S sequences  B sequences of a batch  T positions  D hidden  R outputs  K inputs

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from trainkit.compress.layout import INPUTS, Layout, read_layout
from trainkit.compress.statistics import Statistics
from trainkit.compress.work import States, barrier, block_file, claimed, rank, read_report, world, write_block
from trainkit.errors import UserError
from trainkit.files import file_digest
from trainkit.models.weights import EMBEDDING, check_finite, read_tensors, weight_files


class Sequences(Protocol):
    """Calibration text.

    Attributes:
        tokens_ST: Token ids; padding, if any, follows a sequence's last token.
        counted_ST: True at the positions that count in statistics; never at padding.
    """

    @property
    def tokens_ST(self) -> Tensor: ...
    @property
    def counted_ST(self) -> Tensor: ...


@dataclass
class Part:
    """The linear layers of a block that one call of `visit` may change.

    Attributes:
        index: Number of the block.
        name: Its Hugging Face name.
        linears: Name without `.weight` -> layer, whose weight has the dtype of the calibration.
        inputs: Name -> input that it reads (`layout.INPUTS`).
        by_input: Input -> statistics of it; empty without calibration text.
        dtypes: Name -> dtype of the stored weight.
        replaced: Tensors of the result that replace those of the folder's files; `replace` adds to them.
        layer: transformers' decoder layer.
    """

    index: int
    name: str
    linears: dict[str, nn.Linear]
    inputs: dict[str, str]
    by_input: dict[str, Statistics]
    dtypes: dict[str, torch.dtype]
    layer: nn.Module
    replaced: dict[str, Tensor] = field(default_factory=dict)

    def statistics(self, name: str) -> Statistics:
        """The statistics of the input of a layer."""
        return self.by_input[self.inputs[name]]

    @torch.no_grad()
    def replace(self, name: str, weight_RK: Tensor, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Replaces a weight: inputs of later blocks are computed with it, and the exported files contain it.

        Args:
            name: Name of the layer.
            weight_RK: The new weight; it is rounded to the dtype of the stored one.
            tensors: Tensors of the result's files in place of `name`.weight, for a quantised layer.
        """
        stored = weight_RK.to(self.dtypes[name])
        self.linears[name].weight.copy_(stored if tensors is None else weight_RK)
        self.replaced |= {f"{name}.weight": stored} if tensors is None else tensors


Visit = Callable[[Part], Mapping[str, Any] | None]
"""Changes the weights of a part, using its statistics; returns what to report, JSON-able."""


@dataclass(frozen=True)
class Walked:
    """The result of a walk, still in its work folder.

    Attributes:
        layout: The model's layout.
        work: The work folder.
        reports: What `visit` returned, for each block; those of a block's parts are one dictionary.
    """

    layout: Layout
    work: Path
    reports: list[dict[str, Any]]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the result's files, one at a time: those that `visit` replaced, and the others of the folder."""
        changed = set(self.layout.all_linears())
        names = set[str]()
        for index in range(self.layout.blocks):
            with safe_open(block_file(self.work, index), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  safe_open is not a mapping
                    names.add(name.rpartition(".")[0])
                    yield name, file.get_tensor(name)
        for name, value in read_tensors(self.layout.folder):
            stem, _, kind = name.rpartition(".")
            if not (kind == "weight" and stem in changed & names) and not name.endswith("rotary_emb.inv_freq"):
                yield name, value


@torch.no_grad()
def walk(
    folder: str | Path,
    calibration: Sequences | None,
    visit: Visit,
    *,
    work: Path,
    gram: bool,
    key: Mapping[str, Any] | None = None,
    sequential: bool = False,
    dense: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    title: str = "",
) -> Walked:
    """Visits a model's blocks in order; a block's inputs are measured with the changed blocks before it.

    With several processes, each computes the sequences rank, rank + world size, ...; the statistics are added up, and the first
    process alone visits and sends the changed weights to the others.

    Args:
        folder: Hugging Face folder.
        calibration: Calibration text; None visits without statistics and computes nothing.
        visit: Called for each block, or with `sequential` for each of its four inputs in order.
        work: Folder for the state; every process must see it. The same call with the same folder continues after a kill.
        gram: Whether statistics have the Gram matrix.
        key: Everything else that determines the result, such as the method; JSON-able.
        sequential: Whether the layers of an input are measured after those of the block's earlier inputs were changed. It costs
            four times the forward work.
        dense: Whether the inputs of later blocks are computed with the dense weights, whatever `visit` changes.
        dtype: Precision of the computation.
        device: Device of the computation.
        title: Text before the progress bar.

    Raises:
        UserError: an architecture or file that cannot be used, states that are not finite, or `work` belongs to another call.
    """
    layout = read_layout(folder)
    tokens_ST = None if calibration is None else calibration.tokens_ST[rank() :: world()]
    settings = {"gram": gram, "sequential": sequential, "dense": dense, "dtype": str(dtype), "processes": world()}
    with claimed(work, origin(folder, calibration) | settings | dict(key or {})):
        # Continue after the blocks that are complete; embed the text if there are none.
        done = next(index for index in range(layout.blocks + 1) if not block_file(work, index).is_file())
        states = None
        if calibration is not None and tokens_ST is not None:
            states = States(work, calibration.counted_ST[rank() :: world()], layout.config.hidden_size, dtype)
            if done == 0:
                _embed(layout, states, tokens_ST)
        barrier()
        bar = tqdm(total=layout.blocks, initial=done, desc=title, unit=" blocks", disable=rank() > 0 or None, delay=2)
        for index in range(done, layout.blocks):
            # Load the block; measure and visit it, whole or input by input.
            block = _load_block(layout, index, dtype, device)
            layer, dtypes = block.layers[0], block.stored
            report, replaced = dict[str, Any](), dict[str, Tensor]()
            groups = [(source,) for source in INPUTS] if sequential and states is not None else [tuple(INPUTS)]
            for group in groups:
                statistics = _measure(block, layout, index, states, group, gram, dense and group is groups[-1])
                names = {name: source for name, source in layout.linears(index).items() if source in group}
                linears = {name: layer.get_submodule(name.removeprefix(layout.block(index) + ".")) for name in names}
                part = Part(index, layout.block(index), linears, names, statistics, dtypes, layer)  # type: ignore[arg-type]
                if rank() == 0:
                    report |= visit(part) or {}
                    replaced |= part.replaced
                if world() > 1 and not dense:
                    for linear in part.linears.values():
                        dist.broadcast(linear.weight.data, 0)
            # Compute the next inputs with the changed block, and only then mark it complete.
            if states is not None and not dense:
                _measure(block, layout, index, states, (), False, True)
            barrier()
            if rank() == 0:
                write_block(work, index, replaced, report)
            barrier()
            bar.update()
        bar.close()
        return Walked(layout, work, [read_report(work, index) for index in range(layout.blocks)])


def _embed(layout: Layout, states: States, tokens_ST: Tensor) -> None:
    """Writes the states before the first block."""
    embedding_VD = dict(read_tensors(layout.folder, (EMBEDDING,))).get(EMBEDDING)
    if embedding_VD is None:
        raise UserError(f"{layout.folder}: tensor {EMBEDDING!r} is missing; copy all weight files")
    with states.writer(0) as write:
        for batch in states.batches:
            write(embedding_VD[tokens_ST[batch]].to(states.dtype))


def _load_block(layout: Layout, index: int, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A backbone of one block without embedding and final norm; `stored` has the stored dtype of each linear layer.

    Raises:
        UserError: a tensor is missing, of another size, or not finite.
    """
    from transformers import AutoModel

    # An empty model of one layer; its rotary frequencies are computed, not loaded
    config = copy.deepcopy(layout.config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = [layout.config.layer_types[index]]
    with torch.device("meta"):
        block: Any = AutoModel.from_config(config, dtype=dtype)
    block.rotary_emb = type(block.rotary_emb)(config=config).to(device)
    block.norm, block.embed_tokens = nn.Identity(), nn.Identity()
    # Its weights
    prefix, expected = f"{layout.block(index)}.", block.layers[0].state_dict()
    tensors = dict(read_tensors(layout.folder, {prefix + name for name in expected}))
    for name, place in expected.items():
        if (value := tensors.get(prefix + name)) is None:
            raise UserError(f"{layout.folder}: tensor {prefix + name!r} is missing; copy all weight files")
        if value.shape != place.shape:
            sizes = f"{list(value.shape)}, but the config requires {list(place.shape)}"
            raise UserError(f"{layout.folder}: tensor {prefix + name!r} is {sizes}; give weights that fit config.json")
    check_finite(tensors.items(), str(layout.folder))
    weights = {name: tensors[prefix + name].to(device=device, dtype=dtype, copy=True) for name in expected}
    block.layers[0].load_state_dict(weights, assign=True)
    block.stored = {name.removesuffix(".weight"): value.dtype for name, value in tensors.items()}
    return block.eval().requires_grad_(False)


def _measure(
    block: Any, layout: Layout, index: int, states: States | None, group: tuple[str, ...], gram: bool, write: bool
) -> dict[str, Statistics]:
    """Runs all sequences through the block; returns statistics of the inputs in `group`, over all processes.

    With `write`, the outputs become the states before the next block.
    """
    if states is None:
        return {}
    layer, statistics = block.layers[0], dict[str, Statistics]()
    counted: list[Tensor] = []
    dtype = str(states.dtype).removeprefix("torch.")
    failed = UserError(
        f"{layout.folder}: {layout.block(index)} computes values that are not finite in {dtype} on the calibration text; use "
        "--dtype float32, or repair the model"
    )

    def record(sums: Statistics, args: tuple[Tensor, ...]) -> None:
        try:
            sums.add(args[0], counted[0])
        except UserError:  # it does not know the block
            raise failed from None

    with ExitStack() as stack:
        for source in group:
            linear = layer.get_submodule(INPUTS[source][0])
            sums = statistics[source] = Statistics(linear.in_features, gram, linear.weight.device)
            hook = linear.register_forward_pre_hook(lambda _, args, sums=sums: record(sums, args))
            stack.callback(hook.remove)
        store = stack.enter_context(states.writer(index + 1)) if write else None
        for x_BTD, counted_BT in states.read(index):
            device = layer.mlp.down_proj.weight.device
            counted[:] = [counted_BT.to(device)]
            y_BTD = block(inputs_embeds=x_BTD.to(device), use_cache=False).last_hidden_state
            if not bool(y_BTD.isfinite().all()):
                raise failed
            if store:
                store(y_BTD)
    for sums in statistics.values():
        sums.reduce()
    return statistics


def origin(folder: str | Path, calibration: Sequences | None) -> dict[str, Any]:
    """Digests of a model's weight files and of the calibration text, for the key of a work folder."""
    weights = {file.name: file_digest(file, cached=True) for file in weight_files(folder)}
    return {"weights": weights, "calibration": None if calibration is None else _digest(calibration)}


def _digest(calibration: Sequences) -> str:
    digest = hashlib.sha256(str(tuple(calibration.tokens_ST.shape)).encode())
    for values in (calibration.tokens_ST, calibration.counted_ST):
        digest.update(values.contiguous().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()
