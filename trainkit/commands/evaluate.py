"""`trainkit evaluate`: quality of a model: perplexity, distance from the dense model it was made from, and tasks."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from trainkit import bundle
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.writer import check_positive, quiet_libraries
from trainkit.data.text.calibration import GRAM, shared_text
from trainkit.data.text.chat_template import Encoder, load_tokenizer
from trainkit.data.text.sources import content_hash
from trainkit.errors import UserError
from trainkit.eval.bench.table import grid
from trainkit.eval.perplexity import Text, cut_windows, read_documents, write_own_texts
from trainkit.eval.quality import LanguageModel, measure, summarise
from trainkit.export.compressed import CALIBRATION
from trainkit.export.readme import record_metrics
from trainkit.files import write_json
from trainkit.models.load import find_device, has_tokenizer, read_config
from trainkit.runner import Runner

FIGURES = {
    "perplexity": "perplexity",
    "perplexity_dense": "perplexity of the dense model",
    "ratio": "ratio of perplexities",
    "kl": "KL(dense || model), nats per token",
    "agreement": "top-1 agreement",
}
"""Figure -> its name in the table."""


def evaluate(
    model: Path,
    *,
    text: str | None = None,
    dense: str | None = None,
    length: int | None = None,
    limit: int | None = None,
    own: int | None = None,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    tasks: str | None = None,
    task_path: str | None = None,
    few_shot: int | None = None,
    chat: bool = False,
    drafter: str | None = None,
    batch: int = 8,
    columns: dict[str, str] | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    json: str | None = None,
    record: bool = False,
) -> str:
    """Quality of a model: perplexity on a text, distance from the dense model it was made from, and scores of tasks.

    Perplexity follows the WikiText protocol: documents are joined by blank lines and tokenised once, and cut into windows of
    --length tokens that do not overlap. With --dense also KL(dense || model) in nats per token, the share of tokens at which
    both have the same likeliest token, and the ratio of the perplexities. Intervals are 95 % bootstrap intervals over windows.
    With --own the model also continues prompts of the text, and is compared with the dense model on what it wrote.

    Tasks are those of lm-evaluation-harness (pip install 'trainkit[eval]'), or YAML files of the same form in --task_path. The
    runner is the model: with --drafter, the texts are the same and take less time. With --dense, recovery is the model's score
    as a share of the dense model's.

    Examples:
        trainkit evaluate models/w50 --text test.jsonl --dense models/target --length 512
        trainkit evaluate models/w50 --text wiki.txt --dense models/target --own 64 --record true
        trainkit evaluate models/w50 --tasks hellaswag,gsm8k --dense models/target --drafter models/draft --limit 200

    Args:
        model: Hugging Face folder of any causal LM; tasks and --own need one that the runner decodes.
        text: Text for perplexity: a .txt file, or rows in the formats of `data.train`, chats rendered by the template.
        dense: Folder of the model to compare with; it has the same tokenizer.
        length: Tokens in a window; by default 2048, or as many as the models cover.
        limit: Largest number of windows, and of documents of each task.
        own: Number of prompts of the text that the model continues itself.
        max_new_tokens: Largest number of tokens of a continuation of --own; a prompt is cut to half a window.
        temperature: Temperature of the continuations of --own.
        seed: Seed of the continuations of --own.
        tasks: Names of tasks, with commas between them.
        task_path: Folder of YAML files that define further tasks, for example over local JSON Lines.
        few_shot: Number of examples before each question; by default the task's own number.
        chat: Whether tasks use the chat template.
        drafter: Drafter bundle that makes --own and tasks faster.
        batch: Number of windows or texts computed together.
        columns: Column mapping for the text, from trainkit's names to the file's.
        device: Torch device; `auto` uses a GPU if there is one.
        dtype: Precision of the weights; log-probabilities are always computed in float32.
        json: File for all figures. With it, a command that was interrupted continues on the text where it stopped.
        record: Whether to add the figures to trainkit.json of the model's bundle, and to the README.md of a compressed model.
    """
    # Check the arguments.
    quiet_libraries()
    if text is None and tasks is None:
        raise UserError("nothing to evaluate: give --text FILE, --tasks NAMES or both")
    if own is not None and text is None:
        raise UserError("--own: takes its prompts from the text; give --text FILE too")
    check_positive(limit=limit, own=own, max_new_tokens=max_new_tokens, batch=batch)
    if json is not None and Path(json).is_dir():
        raise UserError(f"--json {json}: is a folder; name a file to write")
    if json is not None and not Path(json).resolve().parent.is_dir():
        raise UserError(f"--json {json}: its folder does not exist; make it first")
    if record:
        bundle.read(model, checksums=False)
    length = _window_length(length, str(model), dense)
    if dense is not None:
        _check_tokenizers(model, dense)
    names = [name for name in (tasks or "").split(",") if name]
    if tasks is not None and not names:
        raise UserError(f"--tasks {tasks!r}: names no task; give names with commas between them")
    for option, value in (("task_path", task_path), ("few_shot", few_shot), ("chat", chat or None)):
        if value is not None and not names:
            raise UserError(f"--{option}: is for tasks; give --tasks NAMES, or leave it out")
    if drafter is not None and not names and own is None:
        raise UserError("--drafter: drafts what the model writes; give --own N or --tasks NAMES, or leave it out")
    if few_shot is not None and few_shot < 0:
        raise UserError(f"--few_shot: {few_shot} must be at least 0")
    harness = _import_harness() if names else None
    loaded = harness.load_tasks(names, task_path, few_shot) if harness else None
    # Evaluate on the text, and on what the model writes itself.
    settings = {"device": str(find_device(device)), "dtype": dtype}
    load = lambda folder, draft: Runner.load(folder, draft, settings["device"], dtype, batch)
    values: dict[str, Any] = {}
    report: list[str] = []
    if text is not None:
        encoder = Encoder(load_tokenizer(str(model)), str(model))
        tokens = read_documents(text, encoder, columns)
        _check_not_calibration(model, tokens, text)
        windows, dropped = cut_windows(tokens, length, text, limit)
        texts = {"text": windows}
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        if own is not None:
            texts["own_text"] = write_own_texts(load(model, drafter), text, encoder, windows, own, columns, **sampling)
        values = _on_texts(str(model), dense, texts, settings, batch, json)
        source = {"file": text, "digest": content_hash(text), "tokenizer": bundle.tokenizer_digest(model)}
        if own is not None:
            values["own_text"] |= sampling
        values["text"] |= source | {"windows": len(windows), "length": length, "dropped_tokens": dropped}
        report.append(
            f"{text}: {len(windows):,} windows of {length:,} tokens, tail of {dropped:,} tokens left out; {dtype} on "
            f"{settings['device']}"
        )
        report += [_text_table(name, found) for name, found in values.items()]
    # Run the tasks.
    if harness is not None:
        models = {"model": (str(model), drafter)} | ({"dense": (dense, None)} if dense else {})
        scores = {}
        for name, (folder, draft) in models.items():
            lm = harness.RunnerLM(load(folder, draft))
            scores[name] = harness.run_tasks(lm, loaded, limit, chat)
            report.append(f"{folder}: {lm.summary}")
            del lm
        values["tasks"] = {"limit": limit, "few_shot": few_shot, "chat": chat, "scores": _with_recovery(**scores)}
        report.append(_task_table(values["tasks"]["scores"]))
    # Write the figures.
    if json is not None:
        write_json(json, {"model": str(model), "dense": dense} | settings | values)
        for name in ("text", "own_text"):
            _partial(json, name).unlink(missing_ok=True)
    if record:
        is_compressed = "compression" in bundle.read(model, checksums=False).extra
        metrics = _recorded(values, settings)
        record_metrics(model, metrics) if is_compressed else bundle.amend(model, metrics=metrics)
    return "\n\n".join(report)


def _window_length(requested: int | None, *folders: str | None) -> int:
    """The requested number of tokens in a window, or 2048 at most; refused if a model covers fewer positions."""
    config = lambda folder: read_config(folder).get_text_config()
    # recurrent models have no limit
    covered = {folder: getattr(config(folder), "max_position_embeddings", 1 << 30) for folder in folders if folder}
    smallest = min(covered, key=lambda folder: covered[folder])
    length = min(2048, covered[smallest]) if requested is None else requested
    if not 2 <= length <= covered[smallest]:
        raise UserError(f"--length: {length} must be at least 2 and at most {covered[smallest]}, the positions of {smallest}")
    return length


def _import_harness() -> Any:
    try:
        from trainkit.eval import harness
    except ImportError as error:
        raise UserError(f"--tasks: lm-evaluation-harness is missing ({error}); pip install 'trainkit[eval]'") from error
    return harness


def _check_tokenizers(model: Path, dense: str) -> None:
    """Refuses a dense model whose token ids mean something else."""
    digests = {bundle.tokenizer_digest(Path(folder)) for folder in (model, dense) if has_tokenizer(folder)}
    sizes = [read_config(folder).get_text_config().vocab_size for folder in (model, dense)]
    if sizes[0] != sizes[1] or len(digests) > 1:
        which = f"a vocabulary of {sizes[1]:,}, {model} one of {sizes[0]:,}" if sizes[0] != sizes[1] else "another tokenizer"
        raise UserError(f"--dense {dense}: has {which}; give the model that {model} was made from")


def _check_not_calibration(model: Path, tokens: list[int], source: str) -> None:
    """Refuses text by which the model was calibrated: its perplexity there is lower than on other text."""
    if (path := model / CALIBRATION).is_file():
        fingerprints = bundle.read_json(path).get("fingerprints")
        if not isinstance(fingerprints, list) or not all(type(one) is int and 0 <= one < 1 << 63 for one in fingerprints):
            raise UserError(f"{path}: holds no list of fingerprints; compress the model again")
        if count := shared_text(fingerprints, torch.tensor([tokens])):
            raise UserError(
                f"{source}: shares text with the calibration of {model} ({count} fingerprints of {GRAM} tokens are equal); "
                "evaluate on other text"
            )


def _on_texts(
    model: str, dense: str | None, texts: dict[str, list[Text]], settings: dict[str, str], batch: int, json: str | None
) -> dict[str, dict[str, Any]]:
    """The figures on each list of texts. With `json`, sums so far are in files beside it, which `_partial` names."""
    dtype, device = getattr(torch, settings["dtype"]), torch.device(settings["device"])
    loaded = LanguageModel(model, dtype, device)
    other = LanguageModel(dense, dtype, device) if dense else None
    weights = [weights_digest(folder) for folder in (model, dense) if json and folder]
    values: dict[str, dict[str, Any]] = {}
    for name, given in texts.items():
        began, key = perf_counter(), hashlib.sha256(repr([weights, settings, batch, name]).encode())
        for text in given:
            key.update(repr([text.start, text.tokens_T.tolist()]).encode())
        sums = measure(loaded, given, other, batch, _partial(json, name) if json else None, key.hexdigest())
        seconds = perf_counter() - began
        values[name] = {"texts": len(given), "predicted_tokens": int(sums["tokens"].sum()), "seconds": round(seconds, 2)}
        values[name] |= {figure: asdict(interval) for figure, interval in summarise(sums).items()}
        if other is not None:
            values[name]["recovery"] = 100 / values[name]["ratio"]["value"]
    return values


def _partial(json: str, name: str) -> Path:
    """The file of the sums so far on the texts of this name."""
    return Path(f"{json}.{name}.part")


def _text_table(name: str, values: dict[str, Any]) -> str:
    rows = [["", "value", "95 % interval"]]
    for figure, label in FIGURES.items():
        if figure in values:
            one = values[figure]
            rows.append([label, f"{one['value']:.4f}", f"[{one['low']:.4f}, {one['high']:.4f}]"])
    tokens, seconds = values["predicted_tokens"], values["seconds"]
    title = {"text": "given text", "own_text": "text that the model wrote"}[name]
    line = f"{title}: {values['texts']:,} sequences, {tokens:,} predicted tokens in {seconds:.1f} s"
    recovery = f"; recovery {values['recovery']:.1f} % (dense perplexity / perplexity)" if "recovery" in values else ""
    return f"{line}{recovery}\n{grid(rows)}"


def _recorded(values: dict[str, Any], settings: dict[str, str]) -> dict[str, Any]:
    """The figures as metrics of a bundle. None removes a figure of an earlier evaluation that this one does not have."""
    metrics: dict[str, Any] = {}
    for name, prefix in (("text", ""), ("own_text", "own_text_")):
        if name in values:
            one = values[name]
            metrics |= {prefix + figure: one[figure]["value"] if figure in one else None for figure in FIGURES}
            metrics |= {f"{prefix}recovery": f"{one['recovery']:.1f} %" if "recovery" in one else None}
    if "text" in values:
        one = values["text"]
        metrics["evaluated_on"] = (
            f"{Path(one['file']).name}, {one['windows']} windows of {one['length']} tokens, {settings['dtype']}"
        )
    if "tasks" in values:
        metrics["task_limit"] = values["tasks"]["limit"]
    for task, scores in values.get("tasks", {}).get("scores", {}).items():
        for metric, one in scores.items():
            metrics[f"{task}_{metric}"] = one["value"]
            metrics[f"{task}_{metric}_recovery"] = f"{one['recovery']:.1f} %" if one.get("recovery") is not None else None
    return metrics


def _with_recovery(model: dict[str, Any], dense: dict[str, Any] | None = None) -> dict[str, Any]:
    """The model's scores; with the dense model's also those, and the recovery in percent."""
    for task, scores in (dense or {}).items():
        for metric, score in scores.items():
            ours, theirs = model[task][metric], score["value"]
            up, down = (ours["value"], theirs) if ours["higher_is_better"] else (theirs, ours["value"])
            ours |= {"dense": theirs, "dense_stderr": score["stderr"], "recovery": 100 * up / down if down else None}
    return model


def _task_table(scores: dict[str, Any]) -> str:
    has_dense = any("dense" in one for task in scores.values() for one in task.values())
    rows = [["task", "metric", "score", "+-", *(["dense", "recovery"] if has_dense else []), ""]]
    number = lambda value, form: "" if value is None else format(value, form)
    for task, metrics in scores.items():
        for metric, one in metrics.items():
            more = [number(one["dense"], ".4f"), number(one["recovery"], ".1f") + " %"] if has_dense else []
            better = "" if one["higher_is_better"] else "lower is better"
            rows.append([task, metric, number(one["value"], ".4f"), number(one["stderr"], ".4f"), *more, better])
    return grid(rows)
