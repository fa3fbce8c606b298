"""Exact joint distribution of four consecutive tokens, compared with what the runner emits over two tables of logits.

A text is cut into blocks of four tokens that are independent of each other; see `tests/support/laws.py`.
"""

# V vocabulary, 4

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support import laws
from tests.support.models import table_runner

Array = NDArray[np.float64]
OFF = -1e4  # logit of a token with probability 0
ROWS = 2048

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "generic": ("generic", {"temperature": 1.0}),
    "warm": ("generic", {"temperature": 0.6}),
    "equal": ("equal", {"temperature": 1.0}),
    "disjoint": ("disjoint", {"temperature": 1.0}),
    "one-hot": ("one-hot draft", {"temperature": 1.0}),
    "zeros": ("zeros in draft", {"temperature": 1.0}),
    "top-p": ("generic", {"temperature": 1.3, "top_p": 0.75}),
    "top-k": ("generic", {"temperature": 0.8, "top_k": 2}),
}
"""Kind of tables and sampling settings, by name of the case."""


def tables(kind: str, generator: np.random.Generator) -> tuple[Array, Array]:
    """Logits of target and draft, [position, last token, V]; position 0 does not depend on the last token."""
    p, q = generator.normal(0, 0.8, (2, 4, 4, 4))
    if kind == "equal":
        q = p.copy()
    elif kind == "disjoint":
        p[..., :2] = OFF
        q[..., 2:] = OFF
    elif kind == "one-hot draft":
        q = np.where(np.arange(4) == generator.integers(0, 4, (4, 4, 1)), 0.0, OFF)
    elif kind == "zeros in draft":
        for position, last in np.ndindex(4, 4):
            q[position, last, generator.choice(4, 2, replace=False)] = OFF
    else:
        assert kind == "generic"
    p[0], q[0] = p[0, :1], q[0, :1]
    return p, q


def skewed(seed: int) -> tuple[Array, Array]:
    """Generic tables of more peaked distributions, on which planted faults show well."""
    p, q = tables("generic", np.random.default_rng(seed))
    return 1.4 * p, 1.4 * q


def sample(p: Array, q: Array, blocks: int, tree: Any, seed: int, **settings: Any) -> tuple[Array, int]:
    """Counts [4, 4, 4, 4] of at least `blocks` blocks from Runner.generate, and the number of blocks in each text."""
    per_text = -(-blocks // ROWS)
    runner = table_runner(torch.tensor(p), torch.tensor(q), ROWS, 4 * per_text + 1)
    outs = runner.generate([[0]] * ROWS, max_new_tokens=4 * per_text, seed=seed, tree=tree, **settings)
    tokens = np.array([out.tokens for out in outs]).reshape(-1, 4)
    return np.bincount(tokens @ [64, 16, 4, 1], minlength=256).reshape(4, 4, 4, 4).astype(float), per_text


def laws_of(p: Array, q: Array, settings: dict[str, Any]) -> tuple[Array, Array]:
    """Probabilities of both tables after temperature, top-k and top-p."""
    sampling = {name: value for name, value in settings.items() if name in ("temperature", "top_p", "top_k")}
    p, q = (np.apply_along_axis(laws.processed, -1, table, **sampling) for table in (p, q))
    return p, q


def check_joint(case: str, tree: Any, method: str, blocks: int, seed: int, trials: int) -> None:
    """Asserts that the emitted blocks have the target's joint distribution, at a level of 1e-4 over `trials` tests."""
    kind, settings = CASES[case]
    p, q = tables(kind, np.random.default_rng(seed))
    counts, _ = sample(p, q, blocks, tree, seed, verify=method, **settings)
    truth = laws.plain_law(laws_of(p, q, settings)[0])
    assert laws.p_value(counts, truth) > 1e-4 / trials
