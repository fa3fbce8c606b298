"""`trainkit bench` end to end on a tiny target: its output files, its comparison of texts, and its error messages."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.targets import make_target
from trainkit.cli import _gather, main
from trainkit.commands.bench import bench
from trainkit.drafters.lm import LMDraft
from trainkit.drafters.medusa import Medusa
from trainkit.errors import UserError
from trainkit.eval.bench.methods import checkpoint_setup, synthetic_setup
from trainkit.eval.bench.metrics import summarise
from trainkit.eval.bench.run import run
from trainkit.eval.bench.table import table
from trainkit.eval.bench.timing import Generated, Method
from trainkit.eval.bench.types import BenchArguments
from trainkit.export.drafter import export_drafter
from trainkit.files import write_json
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner.timing import RoundCost


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A target whose generation_config.json must be ignored (it would change the text), a draft, and a file of prompts."""
    root = tmp_path_factory.mktemp("bench")
    target = make_target(root / "target", num_hidden_layers=2, hidden_size=32, head_dim=8, intermediate_size=48)
    values = json.loads((target / "generation_config.json").read_text())
    (target / "generation_config.json").write_text(json.dumps({**values, "repetition_penalty": 1.7, "do_sample": True}))
    shape = target_shape(target)
    draft = LMDraft(shape, num_layers=2)
    draft.initialise(FrozenTarget(target))
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    (root / "draft").mkdir()
    draft.export(root / "draft", torch.float32)
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"How many clips are {n} clips?"}) + "\n" for n in range(5)))
    return target, root / "draft", prompts


def bench_arguments(**values) -> BenchArguments:
    common = {"depths": (1, 3), "max_new_tokens": 25, "limit": 2, "repeats": 1, "device": "cpu", "baselines": False}
    synthetic = {"synthetic": "tiny", "synthetic_tau": 2.5, "synthetic_kinds": ("lm",), "prompt_length": 16}
    return BenchArguments(**(common | synthetic | values))


def test_bench_writes_table_json_and_plot(folders, tmp_path, capsys, seed):
    """One run writes table, JSON and plot, and every output equals plain decoding's."""
    target, draft, prompts = map(str, folders)
    code = bench(
        target=target,
        drafter=[draft],
        prompts=prompts,
        json=str(tmp_path / "new" / "bench.json"),
        plot=str(tmp_path / "bench.png"),
        depths=(1, 3),
        max_new_tokens=16,
        limit=3,
        repeats=2,
        device="cpu",
    )
    printed = capsys.readouterr()
    assert code == 0 and "at most" in printed.err
    assert all(len(line) <= 100 for line in printed.out.splitlines())
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    names = [one["name"] for one in found["methods"]]
    assert names == [
        "transformers generate",
        "transformers assisted 1",
        "transformers assisted 3",
        "trainkit plain",
        "trainkit depth 1",
        "trainkit depth 3",
    ]
    assert "identical output: 15 of 15, ties: 0" in printed.out and found["mismatches"] == 0
    assert found["prompts"]["count"] == 3 and found["versions"]["torch"].startswith(torch.__version__[:4]) and found["date"]
    assert found["machine"]["processor"] and found["machine"]["copy_bandwidth"] > 0 and found["arguments"]["depths"] == [1, 3]
    for one in found["methods"]:
        assert len(one["seconds"]) == 2 and one["tokens"] == found["methods"][0]["tokens"] and one["threads"] >= 1
    deep = found["methods"][-1]
    assert deep["tau"] >= 1 and deep["rounds"] == sum(deep["accepted"]) and len(deep["alpha_k"]) <= 3
    assert deep["efficiency"] == pytest.approx(deep["speedup"] / deep["tau"])
    assert deep["mbsu"] == pytest.approx(deep["tau"] / (3 * deep["c"] + 1))
    assert deep["roof"] == pytest.approx(deep["tau"] / (deep["v"] + deep["draft"]))
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.png", "new"], "no temporary file stays"


def test_two_drafters_share_one_target(folders, tmp_path, capsys, seed):
    """The flag is given twice; the heads draft at most as deep as their number, and the tree in their bundle is measured."""
    target, draft, prompts = map(str, folders)
    heads = Medusa(target_shape(target), num_heads=2)
    heads.initialise(FrozenTarget(target))
    tree = [[0], [1], [0, 0]]
    export_drafter(heads, tmp_path / "heads", tokenizer=target, runner={"tree": tree})
    out, given = tmp_path / "bench.json", "[[[0],[1],[1,0]],[[0],[0,0],[0,0,0],[0,1]]]"
    common = ["--depths", "[2,3]", "--max_new_tokens", "12", "--limit", "2", "--repeats", "1", "--device", "cpu"]
    code = main(
        [
            "bench",
            "--target",
            target,
            "--drafter",
            draft,
            "--prompts",
            prompts,
            "--drafter",
            str(tmp_path / "heads"),
            *common,
            "--trees",
            given,
            "--json",
            str(out),
            "--plot",
            str(tmp_path / "bench.png"),
        ]
    )
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    ours = {one["name"]: one for one in found["methods"] if one["family"] == "trainkit"}
    assert list(ours) == [
        "trainkit plain",
        "draft depth 2",
        "draft depth 3",
        "draft tree 4, depth 2",
        "draft tree 5, depth 3",
        "heads depth 2",
        "heads tree 4, depth 2",
        "heads tree 4, depth 2'",
    ]
    assert code == 0 and found["mismatches"] == 0 and found["format"] == 3
    assert all(one["identical"]["equal"] == 2 for name, one in ours.items() if name != "trainkit plain")
    assert [one["name"] for one in found["drafters"]] == ["draft", "heads"]
    assert found["drafters"][1]["step_bytes"] == sum(p.numel() * 4 for p in heads.parameters()) // 2
    target_bytes = found["target"]["step_bytes"]
    for name, one in ours.items():
        if name != "trainkit plain":
            drafter = next(drafter for drafter in found["drafters"] if drafter["name"] == one["drafter"])
            assert one["c"] == drafter["step_bytes"] / target_bytes and one["roof"] > 0
            assert one["mbsu"] == pytest.approx(one["tau"] / (one["c"] * one["depth"] + 1))
    assert "depths 3, heads: not run, the drafter has heads for 2" in printed
    assert "1 of the trees, heads: not run" in printed and "\nheads:\n" in printed
    assert max(map(len, printed.splitlines())) <= 100, printed
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_drafters_of_equal_name_get_distinct_names(folders, tmp_path):
    """Two drafter folders of equal name get distinct names, and the target is loaded once."""
    target, draft, prompts = folders
    for parent in ("a", "b"):
        shutil.copytree(draft, tmp_path / parent / "draft")
    twice = tuple(str(tmp_path / parent / "draft") for parent in ("a", "b"))
    setup = checkpoint_setup(
        bench_arguments(target=str(target), drafters=twice, prompts=str(prompts), synthetic=None, depths=(1,), max_new_tokens=8)
    )
    assert [method.name for method in setup.methods] == ["trainkit plain", "a/draft depth 1", "b/draft depth 1"]
    assert all(runner.rounds.target is setup.runner.rounds.target for runner in setup.drafters.values())


def test_list_flags_may_be_repeated():
    """A list flag that is given several times becomes one list."""
    gathered = _gather(["--drafter", "a", "--x", "1", "--drafter=[b", "--drafter"], {"drafter"})
    assert gathered == ["--x", "1", "--drafter", '--drafter=["a", "[b"]']
    assert _gather(["--drafter", '["a"]', "c"], {"drafter"}) == ["c", '--drafter=["a"]']
    assert _gather(["--drafter", "a"], {"drafter"}) == ['--drafter=["a"]']


def test_bad_drafters_or_trees_give_one_line(folders, capsys):
    """A wrong list of drafters or trees gives a one-line error."""
    target, draft, prompts = map(str, folders)
    common = ["bench", "--target", target, "--prompts", prompts, "--device", "cpu", "--baselines", "false", "--drafter", draft]
    for flags, words in (
        (["--drafter", "nowhere"], ("nowhere: no such folder", "give a drafter bundle")),
        (["--drafter", draft], ("given twice",)),
        (["--trees", "[[[0],[2]]]"], ("needs its parent and every lower rank",)),
        (["--trees", "[[0]]"], ("trees:", "list of trees")),
        (["--trees", "nowhere.json"], ("nowhere.json", "give a path that exists")),
    ):
        assert main([*common, *flags]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(word in line for word in words), line


def test_sampling_compares_only_our_outputs(folders, tmp_path, capsys):
    """Above temperature 0 only trainkit's outputs are compared with plain decoding; transformers has its own noise."""
    target, draft, prompts = map(str, folders)
    out = tmp_path / "bench.json"
    common = {"target": target, "drafter": [draft], "prompts": prompts, "depths": (2,), "max_new_tokens": 12, "limit": 2}
    assert bench(**common, repeats=1, temperature=0.8, json=str(out), device="cpu") == 0
    found = {one["name"]: one["identical"] for one in json.loads(out.read_text())["methods"]}
    assert found["transformers generate"] is None and found["trainkit depth 2"]["equal"] == 2
    assert "transformers samples with its own noise" in capsys.readouterr().out


def test_batched_bench_skips_assisted_generation(folders, capsys):
    """With a batch above 1, transformers runs padded batches, and assisted generation is skipped with a note."""
    target, draft, prompts = map(str, folders)
    code = bench(
        target=target,
        drafter=[draft],
        prompts=prompts,
        depths=(2,),
        max_new_tokens=12,
        limit=5,
        repeats=1,
        batch=3,
        device="cpu",
    )
    printed = capsys.readouterr().out
    assert code == 0 and "identical output: 10 of 10" in printed
    assert "transformers assisted: not run, it takes one prompt at a time" in printed


def test_wrong_output_is_reported_as_mismatch():
    """A method that emits a wrong token is counted and named as a mismatch."""
    arguments = bench_arguments()
    setup = synthetic_setup(arguments)

    def wrong(prompts, max_new_tokens, first):
        good = setup.plain.run(prompts, max_new_tokens, first)
        return Generated([[*text[:-1], (text[-1] + 1) % 512] for text in good.tokens], good.stats, good.rounds, good.split)

    setup.methods.append(Method("planted", "trainkit", 0, wrong, ((0,),), *setup.drafters))
    result = run(arguments, setup)
    assert result.mismatches == 2 and not result.identity["trainkit depth 3"].differences
    printed = table(summarise(result))
    assert "MISMATCH: planted, prompt 1, new token 24" in printed and "2 WRONG" in printed


def test_synthetic_bench_figures_by_hand():
    """The seconds are set by hand: plain decoding 4 s, depth 3 2 s, so speedup is 2, and efficiency at tau 2.5 is 0.8."""
    arguments = bench_arguments(max_new_tokens=1 + 50, synthetic_tau=2.5)  # 20 rounds of 2.5 after the prefill's token
    result = run(arguments, synthetic_setup(arguments))
    plain, deep = result.setup.plain, result.setup.methods[-1]
    plain.outputs, deep.outputs = [replace(plain.last, seconds=4.0)], [replace(deep.last, seconds=2.0)]
    found = summarise(result)["methods"][-1]
    assert found["tau"] == 2.5 and found["cut_rounds"] == 0 and found["accepted"] == [0, 20, 20]
    assert found["alpha_k"] == [1.0, 0.5, 0.0]
    assert found["speedup"] == 2.0 and found["efficiency"] == 0.8 and found["x_plain"] == 2.0
    costs = {(1, *rest): RoundCost(0.005, 0.015 if rest[1] else 0.01) for _, *rest in result.costs}  # by hand too
    plain.threads = deep.threads = 1
    values = summarise(replace(result, costs=costs))["methods"][-1]
    assert values["roof"] == pytest.approx(1.25) and values["mbsu"] == pytest.approx(2.5 / (1 + 3 * values["c"]))
    cached = 16 + 51 // 2
    cache_bytes = 2 * 2 * 2 * 16 * 4 * cached  # keys and values, layers, heads, width, float32
    target, (drafting,) = result.setup.runner.rounds.target, result.setup.drafters.values()
    draft = drafting.drafter
    assert draft is not None
    needed = target.step_bytes() + 3 * draft.step_bytes(0) + cache_bytes
    step = (2.0 - deep.last.split["prefill"]) / 40
    assert found["bandwidth"]["bytes"] == needed and found["bandwidth"]["step_seconds"] == pytest.approx(step)
    assert found["bandwidth"]["share"] == pytest.approx(needed / step / result.machine.copy_bandwidth)


def test_max_seconds_reduces_the_prompts():
    """A load that would exceed max_seconds is cut, and the table says so."""
    arguments = bench_arguments(limit=8, max_seconds=1e-6)
    result = run(arguments, synthetic_setup(arguments))
    assert len(result.setup.prompts) == 1 and "1 of 8 prompts, to stay within max_seconds" in table(summarise(result))


def test_bad_options_give_one_line():
    """A wrong option gives a one-line error that names it."""
    for values, message in (
        ({"depths": (2, 2)}, "depths"),
        ({"depths": (0,)}, "depths"),
        ({"repeats": 0}, "repeats 0"),
        ({"synthetic": None}, "--prompts"),
        ({"temperature": 1.0}, "temperature 0"),
        ({"dtype": "int8"}, "dtype 'int8'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            bench_arguments(**values)
        assert "\n" not in str(error.value)


def test_json_has_no_nan_and_is_written_atomically(tmp_path):
    """NaN and infinity become null, and a failed write leaves the old file."""
    path = tmp_path / "bench.json"
    write_json(path, {"tau": float("nan"), "list": [1.0, float("inf")]})
    assert json.loads(path.read_text()) == {"tau": None, "list": [1.0, None]}
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert json.loads(path.read_text())["tau"] is None and [p.name for p in tmp_path.iterdir()] == ["bench.json"]


def test_bench_compares_policies_with_best_fixed_depth(folders, tmp_path, monkeypatch, capsys, seed):
    """Policies are compared with plain decoding and with the best fixed depth."""
    monkeypatch.setenv("TRAINKIT_COSTS", str(tmp_path / "costs"))
    target, draft, prompts = map(str, folders)
    code = bench(
        target=target,
        drafter=[draft],
        prompts=prompts,
        depths=(1, 3),
        policy=["cost", "confidence:0.4", "ema"],
        limit=2,
        max_new_tokens=20,
        repeats=2,
        baselines=False,
        json=str(tmp_path / "bench.json"),
    )
    assert code == 0
    summary, shown = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    with_policy = [one for one in summary["methods"] if "policy" in one]
    assert [one["policy"]["name"] for one in with_policy] == ["cost", "confidence:0.4", "ema"]
    for one in with_policy:
        values = one["policy"]
        assert one["identical"]["mismatches"] == 0 and values["max_depth"] == 3
        assert 0 <= values["drafted_per_round"] <= 3 and values["tau"] >= 1
        accepted = sum(k * n for k, n in enumerate(values["accepted"]))
        drafted = round(values["drafted_per_round"] * values["rounds"])
        assert values["wasted"] == pytest.approx((drafted - accepted) / (accepted + values["rounds"]))
        assert 0 <= values["paused"] <= values["rounds"]
        fixed = values["over_best_fixed"]
        assert fixed["depth"] in (1, 3) and fixed["min"] <= fixed["median"] <= fixed["max"]
        assert one["name"].removeprefix("trainkit ") in shown
    assert "wasted" in shown and "paused" in shown


def test_policy_needs_a_drafter(folders):
    """A policy without a drafter is refused."""
    target, _, prompts = map(str, folders)
    with pytest.raises(UserError, match="needs a --drafter"):
        bench(target=target, prompts=prompts, policy=["cost"], baselines=False)


def test_policy_can_be_the_best_method(tmp_path, monkeypatch, capsys):
    """It drafts deeper than any chain in the bench, and its draft is always correct."""
    monkeypatch.setenv("TRAINKIT_COSTS", str(tmp_path / "costs"))
    code = bench(
        synthetic="tiny",
        synthetic_tau=9.0,
        synthetic_kinds=["lm"],
        depths=(1, 8),
        policy=["ema"],
        limit=1,
        max_new_tokens=60,
        repeats=1,
        baselines=False,
        plot=str(tmp_path / "bench.png"),
        json=str(tmp_path / "bench.json"),
        device="cpu",
    )
    summary = json.loads((tmp_path / "bench.json").read_text())
    assert code == 0 and (tmp_path / "bench.png").stat().st_size > 1000
    assert f"best: {summary['best']}, " in capsys.readouterr().out


def test_unreached_position_has_no_acceptance():
    """Tau 3 at depth 4: each round accepts two tokens and rejects the third; the fourth is never evaluated."""
    arguments = bench_arguments(depths=(4,), max_new_tokens=1 + 30, synthetic_tau=3.0)
    found = summarise(run(arguments, synthetic_setup(arguments)))["methods"][-1]
    assert found["accepted"] == [0, 0, 20] and found["alpha_k"] == [1.0, 1.0, 0.0]
