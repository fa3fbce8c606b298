"""Prompts, oracle, trees, useless draft and tables of recipes/predictor.sh.

    python recipes/predictor.py prompts TEST.jsonl CODE.jsonl SEEN OUT
    python recipes/predictor.py oracle TARGET DRAFTER PROMPTS TEMPERATURE LIMIT OUT.json
    python recipes/predictor.py trees TARGET DRAFTER PROMPTS TEMPERATURE LIMIT OUT.json
    python recipes/predictor.py useless TARGET DRAFTER PROMPTS OUT.json
    python recipes/predictor.py table OUT

The oracle knows how many tokens each round will keep, and pays what this machine asks for drafting and verifying them: no
policy can be faster on the same draft. What fixed depths would make by the same costs stands beside it.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from trainkit.data.text.prompts import read_prompts
from trainkit.eval.tree_search.ranks import BEYOND, walk
from trainkit.runner import DynamicTree, Runner, Stats
from trainkit.runner.policies.cost_model import ChainCosts
from trainkit.runner.sampling import Sampling

MAX_DEPTH = 10
NAMES = ("Aisha", "Bogdan", "Chidi", "Dara", "Emeka", "Freya", "Goran", "Hana", "Ines", "Jomo", "Kenji", "Lotte")
OTHERS = ("Xqor", "Wvenn", "Ruzk", "Pthal", "Oxbri", "Nyzza")
SETS = {"gsm8k": "GSM8K", "mixed": "mixed"}


def prompts(test: Path, code: Path, seen: int, out: Path) -> None:
    """Questions to train on, to judge predictions on and to time; and the mixed set: a third each plain, altered and code."""
    rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
    programs = [json.loads(line)["prompt"] for line in code.read_text(encoding="utf-8").splitlines()]
    questions = [{"prompt": row["question"]} for row in rows]
    later = questions[seen:]
    timed, held = later[:60], later[60:260]
    rng, mixed = random.Random(0), []
    for plain, other, program in zip(timed[0::2], timed[1::2], programs, strict=False):
        mixed += [plain, {"prompt": altered(other["prompt"], rng)}, {"prompt": program}]
    for name, found in {"seen": questions[:seen], "held": held, "gsm8k": timed, "mixed": mixed}.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def altered(question: str, rng: random.Random) -> str:
    """Other numbers, and other names in place of words that begin with a capital in mid-sentence."""
    given: dict[str, str] = {}
    question = re.sub(r"\d+", lambda found: str(rng.randint(2, 10 ** min(5, len(found[0]) + 2))), question)
    word = r"(?<=[a-z,] )[A-Z][a-z]+"
    return re.sub(word, lambda found: given.setdefault(found[0], rng.choice(NAMES + OTHERS)), question)


def oracle(target: Path, drafter: Path, file: Path, temperature: float, limit: int, out: Path) -> None:
    """Tokens a second by this machine's costs, as times plain decoding: of fixed depths, and of who knows each round's end."""
    torch.set_num_threads(1)
    given = read_prompts(str(file), str(target), limit)
    runner = Runner.load(target, drafter, max_batch=8, max_len=max(map(len, given)) + 128 + MAX_DEPTH + 1)
    texts = [one.tokens for one in runner.generate(given, max_new_tokens=128, temperature=temperature, progress=True)]
    ranks = walk(runner, given, texts, MAX_DEPTH, 1, temperature)
    alone = Runner.load(target, drafter, max_batch=1, max_len=512)
    costs = alone.policies.costs(MAX_DEPTH, None, Sampling(temperature))
    runs = [[kept(place) for place in text if place[0] != BEYOND] for text in ranks]
    plain = costs.plain(1)
    fixed = {str(depth): played(runs, costs, depth) * plain for depth in range(1, MAX_DEPTH + 1)}
    rate = 1 / plain
    for _ in range(20):  # Dinkelbach
        tokens, seconds = known(runs, costs, rate)
        rate = tokens / seconds
    found = {"fixed": fixed, "oracle": rate * plain, "best_fixed": max(fixed.values())}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"by costs: best fixed depth {found['best_fixed']:.2f}x plain, oracle {found['oracle']:.2f}x")


def kept(place: Any) -> int:
    """Draft tokens that a round from here keeps, at most `MAX_DEPTH`; beyond the text's end none."""
    return next((depth for depth, rank in enumerate(place.tolist()) if rank != 0), MAX_DEPTH)


def played(runs: list[list[int]], costs: ChainCosts, depth: int) -> float:
    """Tokens a second with a fixed depth."""
    tokens = rounds = 0
    for text in runs:
        place = 0
        while place < len(text):
            step = min(text[place], depth) + 1
            place, tokens, rounds = place + step, tokens + step, rounds + 1
    return tokens / (rounds * costs.round(1, depth, depth))


def known(runs: list[list[int]], costs: ChainCosts, rate: float) -> tuple[float, float]:
    """Tokens and seconds of rounds that draft what is kept, or as much of it as pays at this rate."""
    tokens = seconds = 0.0
    for text in runs:
        place = 0
        while place < len(text):
            worth = {depth: depth + 1 - rate * costs.round(1, depth, depth) for depth in range(text[place] + 1)}
            depth = max(worth, key=lambda depth: worth[depth])
            place, tokens, seconds = place + depth + 1, tokens + depth + 1, seconds + costs.round(1, depth, depth)
    return tokens, seconds


def trees(target: Path, drafter: Path, file: Path, temperature: float, limit: int, out: Path, repeats: int = 3) -> None:
    """Dynamic trees ranked by the draft, by the predictor, and pruned; beside chains; turns prompt by prompt."""
    torch.set_num_threads(1)
    given = read_prompts(str(file), str(target), limit)
    runner = Runner.load(target, drafter, max_batch=1, max_len=max(map(len, given)) + 192)
    shape = DynamicTree(4, 3, 8)
    ways: dict[str, dict[str, Any]] = {
        "plain": {"depth": 0},
        "chain of 3": {"depth": 3},
        "chain, cost": {"policy": "cost"},
        "tree, ranked by the draft": {"tree": shape},
        "tree, ranked by the predictor": {"tree": shape, "policy": "fixed"},
        "tree, pruned without the predictor": {"tree": shape, "policy": "cost-blind"},
        "tree, pruned": {"tree": shape, "policy": "cost"},
    }
    seconds: dict[str, list[float]] = {name: [0.0] * repeats for name in ways}
    stats: dict[str, Stats] = {}
    for repeat in range(-1, repeats):  # the first for warmth, and for what policies learn
        found: dict[str, list[Stats]] = {name: [] for name in ways}
        for place, prompt in enumerate(given):
            texts = {}
            for name, options in ways.items():
                began = perf_counter()
                every = options | {"max_new_tokens": 128, "temperature": temperature}
                ((_, output),) = runner.generate_each([prompt], [(place, 0)], **every)
                texts[name] = output.tokens
                found[name].append(output.stats)
                if repeat >= 0:
                    seconds[name][repeat] += perf_counter() - began
            assert all(text == texts["plain"] for text in texts.values()), place
        stats = {name: Stats.merge(all_) for name, all_ in found.items()}
    result = {
        name: {
            "tau": one.tau,
            "verified": one.drafted / one.rounds,
            "wasted": one.wasted,
            "speedup": statistics.median(a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)),
        }
        for name, one in stats.items()
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, one in result.items():
        print(f"{name:36} tau {one['tau']:.2f}  drafted {one['verified']:.2f}  {one['speedup']:.2f}x plain")


def useless(target: Path, drafter: Path, file: Path, out: Path, repeats: int = 7) -> None:
    """Plain decoding against `cost` with a draft of random weights, batch 8, in turns; the ratio of each pair."""
    torch.set_num_threads(1)
    given = read_prompts(str(file), str(target), 16)
    length = max(map(len, given)) + 128 + MAX_DEPTH + 1
    plain, paced = (Runner.load(target, given_, max_batch=8, max_len=length) for given_ in (None, drafter))
    assert paced.drafter is not None
    torch.manual_seed(0)
    for weight in paced.drafter.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.02)
    policies = ["cost-blind"] + (["cost"] if paced.predictor is not None else [])
    found: dict[str, Any] = {name: [] for name in policies}
    for policy in policies:
        paced.policies.costs(
            MAX_DEPTH, paced.predictor if policy == "cost" else None
        )  # measured once a machine, not once a call
    for repeat in range(repeats + 1):
        seconds = {}
        for name in ("plain", *policies):
            began = perf_counter()
            runner, options = (plain, {"depth": 0}) if name == "plain" else (paced, {"policy": name})
            outs = runner.generate(given, max_new_tokens=128, ignore_end=True, **options)
            seconds[name] = perf_counter() - began
            texts = [one.tokens for one in outs]
            if name == "plain":
                first = texts
            assert texts == first
        for name in policies:
            if repeat:
                found[name].append(seconds["plain"] / seconds[name])
    result = {name: {"median": statistics.median(all_), "min": min(all_), "max": max(all_)} for name, all_ in found.items()}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def table(out: Path) -> None:
    """The tables of recipes/predictor.md."""
    values = json.loads((out / "calibration.json").read_text(encoding="utf-8"))
    names = list(values["groups"][0]["log_loss"])
    print("| records | " + " | ".join(f"{name}: log-loss, ECE" for name in names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for group in values["groups"]:
        cells = [f"{group['log_loss'][name]:.4f}, {group['ece'][name]:.4f}" for name in names]
        print(f"| {group['group']} ({group['records']:,}) | {' | '.join(cells)} |")
    head = "prompts, T | policy | speedup | x best depth (min..max) | thrown away | best depth's | by costs: fixed, oracle"
    print(f"\n| {head} |")
    print("|---" * 7 + "|")
    for file in sorted(out.glob("bench-*.json")):
        name, heat = file.stem.removeprefix("bench-").split("-t")
        ideal = out / f"oracle-{name}-t{heat}.json"
        known_ = json.loads(ideal.read_text(encoding="utf-8")) if ideal.is_file() else None
        for one in json.loads(file.read_text(encoding="utf-8"))["contenders"]:
            if "paced" in one:
                paced, fixed = one["paced"], one["paced"]["over_best_fixed"]
                best = "-" if known_ is None else f"{known_['best_fixed']:.2f}, {known_['oracle']:.2f}"
                spread = f"({fixed['min']:.3f}..{fixed['max']:.3f})"
                print(
                    f"| {SETS[name]}, {heat} | {paced['policy']} | {paced['speedup']:.2f} | {fixed['median']:.3f} {spread} | "
                    f"{paced['wasted']:.2f} | {fixed['wasted']:.2f} at {fixed['depth']} | {best} |"
                )
    print("\n| prompts, T | way | tau | tokens drafted a round | speedup |\n" + "|---" * 5 + "|")
    for file in sorted(out.glob("trees-*.json")):
        name, heat = file.stem.removeprefix("trees-").split("-t")
        for way, one in json.loads(file.read_text(encoding="utf-8")).items():
            print(f"| {SETS[name]}, {heat} | {way} | {one['tau']:.2f} | {one['verified']:.2f} | {one['speedup']:.2f} |")
    if (out / "useless.json").is_file():
        for name, one in json.loads((out / "useless.json").read_text(encoding="utf-8")).items():
            print(f"\nuseless draft, batch 8, {name}: {one['median']:.3f} of plain ({one['min']:.3f}..{one['max']:.3f})")


if __name__ == "__main__":
    command, *given_ = sys.argv[1:]
    if command == "prompts":
        prompts(Path(given_[0]), Path(given_[1]), int(given_[2]), Path(given_[3]))
    elif command == "oracle":
        oracle(Path(given_[0]), Path(given_[1]), Path(given_[2]), float(given_[3]), int(given_[4]), Path(given_[5]))
    elif command == "trees":
        trees(Path(given_[0]), Path(given_[1]), Path(given_[2]), float(given_[3]), int(given_[4]), Path(given_[5]))
    elif command == "useless":
        useless(*(Path(name) for name in given_))
    else:
        table(Path(given_[0]))
