"""Prompt files, oracle, useless draft and tables of the policies study.

    python recipes/studies/policies/tables.py prompts TEST.jsonl CODE.jsonl SEEN OUT
    python recipes/studies/policies/tables.py oracle TARGET DRAFTER PROMPTS TEMPERATURE LIMIT OUT.json
    python recipes/studies/policies/tables.py signals TARGET DRAFTER PROMPTS TEMPERATURE LIMIT SEED OUT.json
    python recipes/studies/policies/tables.py useless TARGET DRAFTER PROMPTS OUT.json
    python recipes/studies/policies/tables.py table OUT

The oracle knows how many draft tokens each round will accept, and pays the drafting and verification costs measured on this
machine: no policy can be faster with the same drafter. Fixed depths are computed from the same costs for comparison. `signals`
decodes with every policy, and gives the speed by processor time and by the costs.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from trainkit.data.text.prompts import read_prompts
from trainkit.eval.tree_search.ranks import PAST_END, replay_ranks
from trainkit.models.predictor import FoldedPredictor
from trainkit.runner import Runner, timing
from trainkit.runner.options import GenerateOptions
from trainkit.runner.policies.chain import level_chance
from trainkit.runner.policies.cost import Cost
from trainkit.runner.policies.cost_model import ChainCosts
from trainkit.runner.policies.logistic import OnlineLogistic
from trainkit.runner.policy import RoundOutcome
from trainkit.runner.sampling import Sampling
from trainkit.runner.trees.shape import Proposals

MAX_DEPTH, NEW_TOKENS = 10, 64
POLICIES = ("logistic", "predictor", "confidence", "cost:logistic", "cost:predictor", "cost:confidence", "cost-blind", "ema")
NAMES = ("Aisha", "Bogdan", "Chidi", "Dara", "Emeka", "Freya", "Goran", "Hana", "Ines", "Jomo", "Kenji", "Lotte")
OTHERS = ("Xqor", "Wvenn", "Ruzk", "Pthal", "Oxbri", "Nyzza")
SETS = {"gsm8k": "GSM8K", "mixed": "mixed"}


def prompts(test: Path, code: Path, seen: int, out: Path) -> None:
    """Writes the prompt files: questions to train on, to evaluate predictions on and to time, and the mixed set.

    The mixed set is a third questions, a third altered questions and a third code.
    """
    rows = [json.loads(line) for line in test.read_text(encoding="utf-8").splitlines()]
    programs = [json.loads(line)["prompt"] for line in code.read_text(encoding="utf-8").splitlines()]
    questions = [{"prompt": row["question"]} for row in rows]
    later = questions[seen:]
    timed, held_out = later[:60], later[60:260]
    rng, mixed = random.Random(0), []
    for plain, other, program in zip(timed[0::2], timed[1::2], programs, strict=False):
        mixed += [plain, {"prompt": altered(other["prompt"], rng)}, {"prompt": program}]
    for name, rows in {"seen": questions[:seen], "held": held_out, "gsm8k": timed, "mixed": mixed}.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def altered(question: str, rng: random.Random) -> str:
    """The question with other numbers, and with other names in place of capitalised words within a sentence."""
    new_names: dict[str, str] = {}
    question = re.sub(r"\d+", lambda match: str(rng.randint(2, 10 ** min(5, len(match[0]) + 2))), question)
    capitalised = r"(?<=[a-z,] )[A-Z][a-z]+"
    return re.sub(capitalised, lambda match: new_names.setdefault(match[0], rng.choice(NAMES + OTHERS)), question)


def oracle(target: Path, drafter: Path, file: Path, temperature: float, limit: int, out: Path) -> None:
    """Speed computed from this machine's costs, as a multiple of plain decoding: of fixed depths, and of the oracle."""
    torch.set_num_threads(1)
    prompt_ids = read_prompts(str(file), str(target), limit)
    runner = Runner.load(target, drafter, max_batch=8, max_len=max(map(len, prompt_ids)) + 128 + MAX_DEPTH + 1)
    texts = [
        output.tokens for output in runner.generate(prompt_ids, max_new_tokens=128, temperature=temperature, progress=True)
    ]
    ranks = replay_ranks(runner, prompt_ids, texts, MAX_DEPTH, 1, temperature)
    alone = Runner.load(target, drafter, max_batch=1, max_len=512)
    costs = alone.policies.costs(MAX_DEPTH, None, Sampling(temperature))
    runs = [[accepted_tokens(ranks_D) for ranks_D in text if ranks_D[0] != PAST_END] for text in ranks]
    plain = costs.plain(1)
    fixed = {str(depth): fixed_speed(runs, costs, depth) * plain for depth in range(1, MAX_DEPTH + 1)}
    rate = 1 / plain
    for _ in range(20):  # Dinkelbach
        tokens, seconds = oracle_round_totals(runs, costs, rate)
        rate = tokens / seconds
    speeds = {"fixed": fixed, "oracle": rate * plain, "best_fixed": max(fixed.values())}
    out.write_text(json.dumps(speeds, indent=1) + "\n", encoding="utf-8")
    print(f"by costs: best fixed depth {speeds['best_fixed']:.2f}x plain, oracle {speeds['oracle']:.2f}x")


def accepted_tokens(ranks_D: Any) -> int:
    """Number of draft tokens that a round from this position accepts, at most `MAX_DEPTH`; 0 past the end of the text."""
    return next((depth for depth, rank in enumerate(ranks_D.tolist()) if rank != 0), MAX_DEPTH)


def fixed_speed(runs: list[list[int]], costs: ChainCosts, depth: int) -> float:
    """Tokens per second with a fixed depth."""
    tokens = rounds = 0
    for text in runs:
        position = 0
        while position < len(text):
            step = min(text[position], depth) + 1
            position, tokens, rounds = position + step, tokens + step, rounds + 1
    return tokens / (rounds * costs.round(1, depth, depth))


def oracle_round_totals(runs: list[list[int]], costs: ChainCosts, rate: float) -> tuple[float, float]:
    """Tokens and seconds of rounds that draft the tokens that will be accepted, or as many of them as pay at this rate."""
    tokens = seconds = 0.0
    for text in runs:
        position = 0
        while position < len(text):
            gain = {depth: depth + 1 - rate * costs.round(1, depth, depth) for depth in range(text[position] + 1)}
            depth = max(gain, key=lambda depth: gain[depth])
            position, tokens, seconds = position + depth + 1, tokens + depth + 1, seconds + costs.round(1, depth, depth)
    return tokens, seconds


def signals(target: Path, drafter: Path, file: Path, temperature: float, limit: int, seed: int, out: Path) -> None:
    """Speed of policies and fixed depths as multiples of plain decoding, batch 1: by processor time and by the costs.

    All methods have the same costs of drafting and verifying, plus the cost of the signal that they read, which is measured
    separately. With one thread, processor time is about the time on an idle machine, apart from shared caches.
    """
    # Measure the costs once, for all methods.
    torch.set_num_threads(1)
    timing.perf_counter = process_time
    prompt_ids = read_prompts(str(file), str(target), limit)
    runner = Runner.load(target, drafter, max_batch=1, max_len=max(map(len, prompt_ids)) + NEW_TOKENS)
    costs, reading = runner.policies.costs(MAX_DEPTH, None, Sampling(temperature)), signal_seconds(runner, temperature)
    runner.policies.costs = lambda *_: costs
    priced = Cost(costs, MAX_DEPTH)
    methods: dict[str, dict[str, Any]] = {"plain": {"depth": 0}}
    methods |= {f"depth {depth}": {"policy": "fixed", "depth": depth} for depth in (1, 2, 3, 4, 6)}
    methods |= {name: {"policy": name} for name in POLICIES if runner.predictor is not None or "predictor" not in name}
    rows: dict[str, dict[str, Any]] = {name: {"tokens": 0, "seconds": 0.0, "times": [], "rounds": 0} for name in methods}
    # Decode each prompt by all methods in turn; record its rounds and their costs.
    for prompt in prompt_ids:
        for name, options in methods.items():
            row, outcomes = rows[name], []
            if "policy" in options:
                policy = runner.policies.chain(
                    options["policy"], GenerateOptions(temperature=temperature, **options), runner.predictor
                )
                policy.policy.learn = partial(_learn_and_record, type(policy.policy).learn, policy.policy, outcomes)
            began = process_time()
            (output,) = runner.generate([prompt], NEW_TOKENS, temperature, seed=seed, **options)
            row["times"].append((process_time() - began) / len(output.tokens))
            signal = policy.policy.signal if "policy" in options else "none"
            rounds = outcomes or [RoundOutcome(1, 0, [0], [0])] * (len(output.tokens) - 1)
            row["seconds"] += sum(priced.predicted_seconds(one) + one.levels * reading[signal] for one in rounds)
            row["tokens"] += sum(sum(one.accepted) + 1 for one in rounds)
            row["rounds"] += len(rounds)
    # Compare with plain decoding.
    plain = rows["plain"]
    for row in rows.values():
        row["tau"] = row["tokens"] / row["rounds"]
        row["by_costs"] = row["tokens"] / row["seconds"] * plain["seconds"] / plain["tokens"]
        row["by_time"] = statistics.median(a / b for a, b in zip(plain["times"], row["times"], strict=True))
    result = {"rows": rows, "signal_seconds": reading, "plain_seconds": costs.plain(1)}
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(f"{name:18} tau {row['tau']:.2f}  x plain by costs {row['by_costs']:.3f}  by time {row['by_time']:.2f}")


def _learn_and_record(learn: Any, policy: Any, outcomes: list[RoundOutcome], outcome: RoundOutcome) -> None:
    learn(policy, outcome)
    outcomes.append(outcome)


def signal_seconds(runner: Runner, temperature: float) -> dict[str, float]:
    """Seconds that reading each signal adds to a draft level: medians of 300 calls, signals in turn."""
    assert runner.drafter is not None
    decoder, device = runner.shape.decoder, runner.device
    noisy_BFK = torch.randn(1, 1, len(getattr(runner.drafter, "draft_vocab", None) or range(decoder.vocab_size)))
    proposals = Proposals(noisy_BFK, None, torch.randn(1, 1, decoder.hidden_size))
    models: dict[str, Any] = {"confidence": None, "logistic": OnlineLogistic(MAX_DEPTH, device)}
    if runner.predictor is not None:
        models["predictor"] = FoldedPredictor(runner.predictor, temperature)
    times: dict[str, list[float]] = {name: [] for name in ("none", *models)}
    with torch.inference_mode():
        for _ in range(300):
            for name, seconds in times.items():
                began = process_time()
                if name == "none":
                    noisy_BFK.argmax(-1)
                else:
                    level_chance(proposals, 0, models[name])[0].tolist()
                seconds.append(process_time() - began)
    typical = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {name: seconds - typical["none"] for name, seconds in typical.items()}


def useless(target: Path, drafter: Path, file: Path, out: Path, repeats: int = 7) -> None:
    """Compares plain decoding with `cost` and a draft of random weights at batch 8; reports the ratio of each pair of runs."""
    torch.set_num_threads(1)
    prompt_ids = read_prompts(str(file), str(target), 16)
    length = max(map(len, prompt_ids)) + 128 + MAX_DEPTH + 1
    plain, paced = (Runner.load(target, folder, max_batch=8, max_len=length) for folder in (None, drafter))
    assert paced.drafter is not None
    torch.manual_seed(0)
    for weight in paced.drafter.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.02)
    policies = ["cost-blind"] + (["cost"] if paced.predictor is not None else [])
    ratios: dict[str, Any] = {name: [] for name in policies}
    for policy in policies:
        paced.policies.costs(MAX_DEPTH, paced.predictor if policy == "cost" else None)  # measured now, outside the timed calls
    for repeat in range(repeats + 1):
        seconds = {}
        for name in ("plain", *policies):
            began = perf_counter()
            runner, options = (plain, {"depth": 0}) if name == "plain" else (paced, {"policy": name})
            outputs = runner.generate(prompt_ids, max_new_tokens=128, ignore_end=True, **options)
            seconds[name] = perf_counter() - began
            texts = [output.tokens for output in outputs]
            if name == "plain":
                first = texts
            assert texts == first
        for name in policies:
            if repeat:
                ratios[name].append(seconds["plain"] / seconds[name])
    result = {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)} for name, values in ratios.items()
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def table(out: Path) -> None:
    """Prints the tables of the study."""
    values = json.loads((out / "calibration.json").read_text(encoding="utf-8"))
    names = list(values["groups"][0]["log_loss"])
    print(
        "| records | " + " | ".join(f"{name}: log-loss, ECE, AUC" for name in names) + " |\n" + "|---" * (len(names) + 1) + "|"
    )
    for group in values["groups"]:
        cells = [f"{group['log_loss'][name]:.4f}, {group['ece'][name]:.4f}, {group['auc'][name]:.3f}" for name in names]
        print(f"| {group['group']} ({group['records']:,}) | {' | '.join(cells)} |")
    head = "prompts, T | policy | speedup | x best depth (min..max) | wasted | best depth's | by costs: fixed, oracle"
    print(f"\n| {head} |")
    print("|---" * 7 + "|")
    for file in sorted(out.glob("bench-*.json")):
        name, temperature = file.stem.removeprefix("bench-").split("-t")
        ideal = out / f"oracle-{name}-t{temperature}.json"
        ideal_values = json.loads(ideal.read_text(encoding="utf-8")) if ideal.is_file() else None
        for method in json.loads(file.read_text(encoding="utf-8"))["methods"]:
            if "policy" in method:
                policy, fixed = method["policy"], method["policy"]["over_best_fixed"]
                best = "-" if ideal_values is None else f"{ideal_values['best_fixed']:.2f}, {ideal_values['oracle']:.2f}"
                ratio = f"{fixed['median']:.3f} ({fixed['min']:.3f}..{fixed['max']:.3f})"
                print(
                    f"| {SETS[name]}, {temperature} | {policy['name']} | {policy['speedup']:.2f} | {ratio} | "
                    f"{policy['wasted']:.2f} | {fixed['wasted']:.2f} at {fixed['depth']} | {best} |"
                )
    for first in sorted(out.glob("signals-*-0.json")):
        files = sorted(out.glob(first.name.replace("-0.json", "-*.json")))
        runs = [json.loads(file.read_text(encoding="utf-8"))["rows"] for file in files]
        print(
            f"\n{first.stem.removesuffix('-0')}, {len(runs)} seeds: tau, x plain by processor time, x plain by costs (medians)"
        )
        for name in runs[0]:
            cells = [statistics.median(run[name][column] for run in runs) for column in ("tau", "by_time", "by_costs")]
            print(f"| `{name}` | {cells[0]:.2f} | {cells[1]:.3f} | {cells[2]:.3f} |")
    if (out / "useless.json").is_file():
        for name, ratio in json.loads((out / "useless.json").read_text(encoding="utf-8")).items():
            print(f"\nuseless draft, batch 8, {name}: {ratio['median']:.3f} of plain ({ratio['min']:.3f}..{ratio['max']:.3f})")


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "prompts":
        test, code, seen, out = arguments
        prompts(Path(test), Path(code), int(seen), Path(out))
    elif command == "oracle":
        target, drafter, file, temperature, limit, out = arguments
        oracle(Path(target), Path(drafter), Path(file), float(temperature), int(limit), Path(out))
    elif command == "useless":
        useless(*(Path(name) for name in arguments))
    elif command == "signals":
        target, drafter, file, temperature, limit, seed, out = arguments
        signals(Path(target), Path(drafter), Path(file), float(temperature), int(limit), int(seed), Path(out))
    else:
        table(Path(arguments[0]))
