from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import jsonargparse
import pytest
import torch
from torch import Tensor, nn

from tests.support.eager import LOSSES, eager
from trainkit.losses import divergence
from trainkit.losses.chunked import HeadRows
from trainkit.losses.divergence import TV, ChunkedDivergence, CrossEntropy, ForwardKL, LossOutput, TVDpp
from trainkit.losses.measures import coupled_acceptance
from trainkit.losses.topk import TopKHead, compress

N, V, K, D = 23, 31, 12, 8


class Case:
    """Random hidden states and heads in float64, of different widths for draft and target."""

    def __init__(self, trimmed: bool) -> None:
        self.hidden = torch.randn(N, D, dtype=torch.float64)
        self.head = nn.Linear(D, K if trimmed else V, dtype=torch.float64)
        self.target_hidden = torch.randn(N, D + 3, dtype=torch.float64)
        self.target_head = nn.Linear(D + 3, V, dtype=torch.float64)
        ids = torch.randperm(V)[:K]
        self.ids = ids if trimmed else None
        self.mask = torch.rand(N) < 0.6
        self.mask[5] = True
        self.labels = torch.randint(V, (N,))
        if trimmed:
            self.labels[::2] = ids[torch.randint(K, (len(self.labels[::2]),))]  # some inside, most others outside

    def run(self, loss: ChunkedDivergence, **given: object) -> tuple[LossOutput, list[Tensor]]:
        hidden, head = self.hidden.clone().requires_grad_(), copy.deepcopy(self.head)
        arguments = {"ids_K": self.ids, "mask_N": self.mask, "labels_N": self.labels} | given
        output = loss(hidden, head, self.target_hidden, self.target_head, **arguments)  # type: ignore[arg-type]
        output.mean.backward()
        assert self.target_head.weight.grad is None
        return output, [x.grad for x in (hidden, head.weight, head.bias)]  # type: ignore[misc]

    def eager(self, name: str, temperature: float) -> tuple[Tensor, Tensor, list[Tensor]]:
        hidden, head = self.hidden.clone().requires_grad_(), copy.deepcopy(self.head)
        columns, weight = self.labels, self.mask.double()
        if self.ids is not None:
            columns = (self.ids[None] == self.labels[:, None]).int().argmax(-1)
            if name == "ce":
                weight = weight * torch.isin(self.labels, self.ids)
        with torch.no_grad():
            target = self.target_head(self.target_hidden)
        total = eager(name, head(hidden), target, columns, weight, self.ids, temperature)
        (total / weight.sum()).backward()
        return total.detach(), weight.sum(), [x.grad for x in (hidden, head.weight, head.bias)]  # type: ignore[misc]


def with_settings(loss: ChunkedDivergence, chunk: int, temperature: float = 1.0) -> ChunkedDivergence:
    other = loss.measuring()
    other.chunk, other.temperature = chunk, temperature
    return other


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_chunked_loss_equals_eager_value_and_gradient(seed, name, trimmed, chunk):
    """The chunked loss equals the eager one in value and gradient."""
    case = Case(trimmed)
    output, gradients = case.run(with_settings(LOSSES[name], chunk, 0.7))
    total, count, expected = case.eager(name, 0.7)
    assert output.count.item() == count.item()
    torch.testing.assert_close(output.sum, total, rtol=1e-10, atol=1e-12)  # float64; only the order of sums differs
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trimmed", [False, True])
def test_metrics_are_exact_per_token(seed, trimmed):
    """The metrics per token and their sums equal those from whole distributions."""
    case = Case(trimmed)
    output, _ = case.run(with_settings(TV(), 4))
    p = case.target_head(case.target_hidden).softmax(-1)
    q = torch.zeros_like(p)
    logits = case.head(case.hidden)
    q[:, slice(None) if case.ids is None else case.ids] = logits.softmax(-1)
    expected = {
        "alpha": torch.minimum(p, q).sum(-1),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "alpha_coupled": coupled_acceptance(p, q),  # over the whole vocabulary, with explicit zeros
    }
    assert output.metrics.keys() == output.per_token.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(output.per_token[name], value * case.mask, rtol=0, atol=1e-12)
        torch.testing.assert_close(output.metrics[name], (value * case.mask).sum(), rtol=0, atol=1e-12)
        assert not output.metrics[name].requires_grad
    torch.testing.assert_close(output.sum, output.count - output.metrics["alpha"], rtol=0, atol=1e-12)
    assert "alpha_coupled" not in case.run(TV())[0].metrics


@pytest.mark.parametrize("name", [*LOSSES, "tvdpp_sampled"])
def test_masked_tokens_change_nothing(seed, name):
    """Masked tokens, even NaN or infinite ones, change neither loss nor gradients."""
    case = Case(trimmed=False)
    loss = LOSSES.get(name) or TVDpp("sampled")
    torch.manual_seed(seed)
    before, gradients = case.run(loss)
    case.hidden[~case.mask], case.target_hidden[~case.mask] = torch.nan, torch.inf
    torch.manual_seed(seed)
    after, again = case.run(loss)
    assert before.sum.item() == after.sum.item()
    for x, y in zip(gradients, again, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert (again[0][~case.mask] == 0).all()


def test_no_mask_counts_all_and_empty_mask_counts_none(seed):
    """Without a mask every token counts; with an empty one the loss and all gradients are 0."""
    case = Case(trimmed=False)
    output, gradients = case.run(ForwardKL(chunk=4), mask_N=None)
    whole, expected = case.run(ForwardKL(chunk=4), mask_N=torch.ones(N, dtype=torch.bool))
    assert output.count.item() == N and output.sum.item() == whole.sum.item()
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)
    output, gradients = case.run(ForwardKL(), mask_N=torch.zeros(N, dtype=torch.bool))
    assert output.mean.item() == 0 and output.metrics["alpha"].item() == 0
    assert all((gradient == 0).all() for gradient in gradients)  # zero but present: DDP waits for every parameter


@pytest.mark.parametrize("trainable", ["hidden", "head"])
def test_hidden_states_or_head_may_be_frozen(seed, trainable):
    """With frozen hidden states or a frozen head the other gradient is unchanged."""
    case = Case(trimmed=False)
    _, expected = case.run(ForwardKL(chunk=5))
    hidden = case.hidden.clone().requires_grad_(trainable == "hidden")
    head = copy.deepcopy(case.head).requires_grad_(trainable == "head")
    ForwardKL(chunk=5)(hidden, head, case.target_hidden, case.target_head, mask_N=case.mask).mean.backward()
    ours = [hidden.grad] if trainable == "hidden" else [head.weight.grad, head.bias.grad]
    for x, y in zip(ours, expected[:1] if trainable == "hidden" else expected[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_no_grad_gives_the_same_loss_and_metrics(seed):
    """Without gradients the loss and the metrics are the same."""
    case = Case(trimmed=False)
    with_gradient, _ = case.run(TVDpp(normalise="batch"))
    with torch.no_grad():
        without = TVDpp(normalise="batch")(case.hidden, case.head, case.target_hidden, case.target_head, mask_N=case.mask)
    assert without.sum.item() == with_gradient.sum.item() and not without.sum.requires_grad
    assert without.metrics["alpha"].item() == with_gradient.metrics["alpha"].item()


def test_backward_may_run_twice(seed):
    """A second backward pass gives the same gradient."""
    case = Case(trimmed=False)
    hidden = case.hidden.clone().requires_grad_()
    total = TVDpp(chunk=6)(hidden, case.head, case.target_hidden, case.target_head).sum
    first, second = (torch.autograd.grad(3 * total, hidden, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_batch_statistics_over_micro_batches_are_exact(seed, estimator):
    """TVD++ with batch statistics over three micro-batches equals one large batch."""
    case = Case(trimmed=True)
    loss = TVDpp(estimator, "batch", chunk=4)
    assert loss.spans_batch and not TVDpp(normalise="position").spans_batch
    torch.manual_seed(seed)
    _, expected = case.run(loss)

    parts = [slice(0, 3), slice(3, 14), slice(14, N)]
    hidden, head = case.hidden.clone().requires_grad_(), copy.deepcopy(case.head)

    def call(form, part):
        return form(hidden[part], head, case.target_hidden[part], case.target_head, case.ids, case.mask[part])

    first = loss.first_pass()
    gathered = [call(first, part) for part in parts]
    sums = {name: sum(output.metrics[name] for output in gathered) for name in gathered[0].metrics}  # type: ignore[misc]
    count = sum(output.count for output in gathered)
    assert not gathered[0].sum.requires_grad
    torch.manual_seed(seed)  # three consecutive calls have the draws of the single call
    for part in parts:
        (call(loss.with_statistics(sums, count), part).sum / count).backward()  # type: ignore[arg-type]
    for ours, theirs in zip((hidden.grad, head.weight.grad, head.bias.grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    # Normalising each micro-batch by itself gives another gradient, so the test can fail.
    alone = copy.deepcopy(case.head)
    for part in parts:
        own = loss(case.hidden[part], alone, case.target_hidden[part], case.target_head, case.ids, case.mask[part])
        (own.sum / count).backward()
    assert alone.weight.grad is not None and (alone.weight.grad - expected[1]).abs().max() > 1e-6


def test_labels_default_to_the_targets_argmax(seed):
    """Without labels the target's argmax is used; with labels no target is needed."""
    case = Case(trimmed=True)
    labels = case.target_head(case.target_hidden).argmax(-1)
    assert case.ids is not None
    chosen, expected = case.run(CrossEntropy(chunk=3), labels_N=None), case.run(CrossEntropy(), labels_N=labels)
    assert chosen[0].count.item() == expected[0].count.item() == (torch.isin(labels, case.ids) & case.mask).sum().item()
    torch.testing.assert_close(chosen[1], expected[1], rtol=1e-10, atol=1e-13)
    alone = CrossEntropy()(case.hidden, case.head, case.hidden, None, case.ids, case.mask, labels)
    torch.testing.assert_close(alone.sum, expected[0].sum, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="neither"):
        CrossEntropy()(case.hidden, case.head, case.hidden, None)


def test_mismatched_sizes_are_refused(seed):
    """Vocabulary sizes that do not match are refused."""
    case = Case(trimmed=True)
    with pytest.raises(ValueError, match=f"{K} differs from the target's {V}"):
        case.run(TV(), ids_K=None)
    with pytest.raises(ValueError, match=f"{K} logits for {K - 1}"):
        case.run(TV(), ids_K=torch.arange(K - 1))


def test_recomputation_uses_the_forward_autocast(seed):
    """Recomputation in the backward pass uses the forward pass's autocast."""
    case = Case(trimmed=False)
    hidden, head = case.hidden.float().requires_grad_(), copy.deepcopy(case.head).float()
    target_head = copy.deepcopy(case.target_head).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = ForwardKL(chunk=6)(hidden, head, case.target_hidden.float(), target_head)
    assert output.sum.dtype == torch.float32
    output.sum.backward()  # outside autocast: the recomputed logits must be bfloat16 again
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden.detach())
        gradient = (logits.float().softmax(-1) - target_head(case.target_hidden.float()).float().softmax(-1)).bfloat16()
    torch.testing.assert_close(hidden.grad, (gradient @ head.weight.bfloat16()).float(), rtol=0.02, atol=0.01)  # bfloat16


@pytest.mark.parametrize("name", ["CrossEntropy", "ForwardKL", "ReverseKL", "JSD", "TV", "TVDpp", "LK"])
def test_every_divergence_is_configurable_and_documented(name, capsys):
    """Every divergence can be chosen in a configuration, and its arguments are documented."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--divergence", type=ChunkedDivergence)
    path = f"{divergence.__name__}.{name}"
    values = parser.parse_args([f"--divergence={path}", "--divergence.chunk=7", "--divergence.temperature=0.5"])
    loss = parser.instantiate(values).divergence
    assert type(loss).__name__ == name and (loss.chunk, loss.temperature) == (7, 0.5)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--divergence.help={path}"])
    text = capsys.readouterr().out
    arguments = [line for line in text.splitlines() if "(type:" in line or line.strip().startswith("--divergence.")]
    assert "Tokens whose logits exist at once" in text and "Softmax temperature" in text
    assert arguments and all("(required" not in line for line in arguments)


def _rank(rank: int, folder: str, state: dict) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    class Draft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(D, D, dtype=torch.float64), nn.Linear(D, V, dtype=torch.float64)

        def forward(self, hidden: Tensor, target: Tensor, mask: Tensor) -> Tensor:
            loss, hidden = ForwardKL(chunk=3), self.body(hidden)  # the head is used by eight chunks of two calls
            total = sum(loss(h, self.head, target, lambda x: x, mask_N=mask).sum for h in (hidden, 2 * hidden))
            return total  # type: ignore[return-value]

    model = Draft()
    model.load_state_dict(state["weights"])
    ddp = nn.parallel.DistributedDataParallel(model)
    half = slice(rank * 10, rank * 10 + 10)
    ddp(state["hidden"][half], state["target"][half], state["mask"][half]).backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/ddp.pt")
    torch.distributed.barrier()
    if rank == 0:
        alone = Draft()
        alone.load_state_dict(state["weights"])
        (alone(state["hidden"], state["target"], state["mask"]) / 2).backward()  # DDP averages over its two ranks
        torch.save({name: p.grad for name, p in alone.named_parameters()}, f"{folder}/alone.pt")
    torch.distributed.destroy_process_group()


def test_gradients_under_ddp_equal_one_process(seed, tmp_path: Path):
    """Gradients over two DDP processes equal those of one process."""
    body, head = nn.Linear(D, D, dtype=torch.float64), nn.Linear(D, V, dtype=torch.float64)
    weights = {f"body.{k}": v for k, v in body.state_dict().items()} | {f"head.{k}": v for k, v in head.state_dict().items()}
    mask = torch.rand(20) < 0.5
    mask[10:] = False  # no token counts on the second rank, which must still take part
    state = {"weights": weights, "hidden": torch.randn(20, D).double(), "target": torch.randn(20, V).double(), "mask": mask}
    torch.multiprocessing.spawn(_rank, (str(tmp_path), state), nprocs=2)
    ours, expected = torch.load(tmp_path / "ddp.pt"), torch.load(tmp_path / "alone.pt")
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-13)
        assert gradient.abs().max() > 0 or not mask.any()


class Heads:
    """Rows of three heads over shared target rows, in float64; the middle head counts nothing if `gap`."""

    def __init__(self, trimmed: bool, own: bool, gap: bool = False) -> None:
        self.case, self.sizes = Case(trimmed), [7, 0 if gap else 9, 11]
        self.index = torch.cat([torch.randperm(N)[:size].sort().values for size in self.sizes])
        self.hidden = torch.randn(len(self.index), D, dtype=torch.float64)
        self.labels = self.case.labels[self.index]
        self.heads = [copy.deepcopy(self.case.head) for _ in self.sizes]
        for head in self.heads[1:]:
            nn.init.normal_(head.weight) if own else None
        self.own = own

    def together(self, loss: Callable[..., LossOutput], decay: float, inside: bool) -> tuple[LossOutput, list[Tensor]]:
        rows = HeadRows(self.sizes, self.index, decay, inside)
        hidden, heads = self.hidden.clone().requires_grad_(), copy.deepcopy(self.heads if self.own else self.heads[:1])
        head, case = heads if self.own else heads[0], self.case
        output = loss(hidden, head, case.target_hidden, case.target_head, case.ids, labels_N=self.labels, rows=rows)
        output.sum.backward()
        return output, [hidden.grad, *(head.weight.grad for head in heads)]  # type: ignore[list-item]

    def one_by_one(self, loss: Callable[..., LossOutput], decay: float, inside: bool) -> tuple[list[LossOutput], list[Tensor]]:
        hidden, heads = self.hidden.clone().requires_grad_(), copy.deepcopy(self.heads if self.own else self.heads[:1])
        case, outputs, total = self.case, [], torch.zeros((), dtype=torch.float64)
        likely = case.target_head(case.target_hidden).argmax(-1)
        parts = zip(hidden.split(self.sizes), self.index.split(self.sizes), self.labels.split(self.sizes), strict=True)
        for number, (hidden_nD, index_n, labels_n) in enumerate(parts):
            mask = torch.isin(likely[index_n], case.ids) if inside and case.ids is not None else None
            head = heads[number if self.own else 0]
            target = case.target_hidden[index_n]
            outputs.append(loss(hidden_nD, head, target, case.target_head, case.ids, mask, labels_n))
            total = total + decay**number * outputs[-1].sum
        total.backward()
        return outputs, [hidden.grad, *(head.weight.grad for head in heads)]  # type: ignore[list-item]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_heads_together_equal_heads_one_by_one(seed, name, trimmed, own):
    """Sharing target rows changes no loss, gradient, count or metric of any head, also where a head counts nothing."""
    for gap, chunk, inside in ((False, 4, True), (True, 100, False), (False, 1, False)):
        heads, loss = Heads(trimmed, own, gap), with_settings(LOSSES[name], chunk, 0.7)
        if loss.spans_batch:  # statistics of all heads, as in training
            first = loss.first_pass()  # type: ignore[attr-defined]
            with torch.no_grad():
                outputs = [first(*given) for given in heads_arguments(heads, inside)]
            sums = {"reward": torch.stack([output.metrics["reward"] for output in outputs]).sum()}
            loss = loss.with_statistics(sums, torch.stack([output.count for output in outputs]).sum())  # type: ignore[attr-defined]
        if getattr(loss, "estimator", "exact") == "sampled":
            continue  # other draws
        output, gradients = heads.together(loss, 0.8, inside)
        outputs, expected = heads.one_by_one(loss, 0.8, inside)
        total = sum(0.8**number * part.sum for number, part in enumerate(outputs))
        torch.testing.assert_close(output.sum, total, rtol=1e-10, atol=1e-12)
        assert output.count == sum(part.count for part in outputs)
        counted = output.per_token["counted"].split(heads.sizes)
        assert [part.sum() for part in counted] == [part.count for part in outputs]
        for key, value in output.metrics.items():
            for part, values in zip(outputs, output.per_token[key].split(heads.sizes), strict=True):
                torch.testing.assert_close(values, part.per_token[key], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(value, torch.stack([part.metrics[key] for part in outputs]).sum())
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def heads_arguments(heads: Heads, inside: bool):
    """Arguments of a call for each head alone."""
    case = heads.case
    likely = case.target_head(case.target_hidden).argmax(-1)
    parts = zip(heads.hidden.split(heads.sizes), heads.index.split(heads.sizes), heads.labels.split(heads.sizes), strict=True)
    for number, (hidden_nD, index_n, labels_n) in enumerate(parts):
        mask = torch.isin(likely[index_n], case.ids) if inside and case.ids is not None else None
        head = heads.heads[number if heads.own else 0]
        yield hidden_nD, head, case.target_hidden[index_n], case.target_head, case.ids, mask, labels_n


def test_heads_of_a_stored_teacher_share_its_rows(seed):
    """Rows of a top-k teacher at k = V give the loss of the hidden states that they were made from."""
    heads = Heads(trimmed=True, own=False)
    expected, gradients = heads.together(ForwardKL(chunk=6), 0.8, inside=True)
    heads.case.target_hidden = compress(heads.case.target_head(heads.case.target_hidden), V, torch.float64)
    heads.case.target_head = TopKHead(V, V)  # type: ignore[assignment]
    output, same = heads.together(ForwardKL(chunk=6), 0.8, inside=True)
    torch.testing.assert_close(output.sum, expected.sum, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(same, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
