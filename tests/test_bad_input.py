"""A table of user mistakes. Each gives one line that names the problem and the remedy, exit code 2, and leaves no files.

Each row of the table damages sound inputs in a folder of its own and gives the command line that meets the damage.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import pickle
import resource
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.support.recipes import small_recipe
from tests.support.targets import make_target
from trainkit import cli

ROWS = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}."} for n in range(12)]
CHAT = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "72 clips."}]}


@dataclass
class Inputs:
    """Valid inputs, read only, and a folder where a row of the table writes damaged copies."""

    folder: Path
    target: Path
    other: Path
    """A target of a larger vocabulary."""
    draft: Path
    """A bundle made for `target`."""
    run: Path
    """A run that trained this draft."""
    language: Path
    """A checkpoint of a language model."""
    rows: Path
    cache: Path
    patch: pytest.MonkeyPatch

    @property
    def checkpoint(self) -> Path:
        return self.run / "checkpoints" / "last.ckpt"

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        return path

    def lines(self, *rows: Any, name: str = "rows.jsonl") -> Path:
        """Rows as JSON lines; a string is written as it is."""
        return self.write(name, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    def copy(self, what: Path, name: str, change: Callable[[Path], Any]) -> Path:
        """A copy of a folder or file, changed."""
        place = self.folder / name
        if what.is_dir():
            shutil.copytree(what, place)
        else:
            shutil.copyfile(what, place)
        change(place)
        return place

    def model(self, change: Callable[[Path], Any]) -> Path:
        """The target, changed."""
        return self.copy(self.target, "model", change)

    def bundle(self, change: Callable[[Path], Any]) -> Path:
        """The draft, changed."""
        return self.copy(self.draft, "bundle", change)

    # Command lines with valid inputs; a row replaces one of them.

    def fit(self, recipe: Path | None = None, **flags: Any) -> list[str]:
        values = {"trainer.default_root_dir": self.folder / "run"} | {key.replace("__", "."): v for key, v in flags.items()}
        recipe = recipe or self.recipe()
        return ["fit", "--config", str(recipe), *(str(p) for key, value in values.items() for p in (f"--{key}", value))]

    def recipe(self, **changes: Any) -> Path:
        path = self.cache / "recipe.yaml" if not changes else self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(small_recipe(self.target, self.rows, self.cache) | changes))
        return path

    def generate(self, **flags: Any) -> list[str]:
        return command("generate", {"target": self.target, "prompt": "How many?", "max_new_tokens": 4} | flags)

    def distill(self, **flags: Any) -> list[str]:
        sound = {"target": self.target, "prompts": self.rows, "out": self.folder / "out", "temperatures": "[0]"}
        return command("distill", sound | {"max_new_tokens": 4, "limit": 2} | flags)

    def bench(self, **flags: Any) -> list[str]:
        sound = {"target": self.target, "drafter": self.draft, "prompts": self.rows, "max_new_tokens": 4, "limit": 1}
        return command("bench", sound | {"repeats": 1, "json": self.folder / "bench.json"} | flags)

    def alpha(self, **flags: Any) -> list[str]:
        sound = {"target": self.target, "drafter": self.draft, "data": self.rows, "length": 64}
        return command("alpha", sound | {"json": self.folder / "alpha.json"} | flags)

    def trim(self, bundle: Path | None = None, **flags: Any) -> list[str]:
        out = flags.pop("out", self.folder / "out")
        sound = {"target": self.target, "text": self.rows}
        return ["trim", str(bundle or self.draft), str(out), *command("", sound | flags)[1:]]

    def export(self, checkpoint: Path | None = None, **flags: Any) -> list[str]:
        out = flags.pop("out", self.folder / "out")
        return ["export", str(checkpoint or self.checkpoint), str(out), *command("", flags)[1:]]


def command(name: str, flags: dict[str, Any]) -> list[str]:
    return [name, *(str(part) for key, value in flags.items() for part in (f"--{key}", value))]


LANGUAGE = {
    "class_path": "LanguageModule",
    "init_args": {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
        }
    },
}


@pytest.fixture(scope="module")
def no_bars() -> Iterator[None]:
    """Switches off progress bars of transformers, as the command line does in a process of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    yield
    if shown:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def sound(no_bars: None, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    home = tmp_path_factory.mktemp("sound")
    target, other = make_target(home / "target", num_hidden_layers=2), make_target(home / "other", vocab_size=400)
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    inputs = Inputs(home, target, other, home / "draft", home / "run", home, rows, home, pytest.MonkeyPatch())
    assert cli.main(inputs.fit()) == 0
    assert cli.main(inputs.export(out=inputs.draft)) == 0
    values = small_recipe(target, rows, home) | {"model": LANGUAGE}
    values["data"]["init_args"]["tokenizer"] = str(target)
    (home / "language.yaml").write_text(yaml.safe_dump(values))
    language = home / "language"
    assert cli.main(inputs.fit(home / "language.yaml", trainer__default_root_dir=language)) == 0
    inputs.language = language / "checkpoints" / "last.ckpt"
    return inputs


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


def manifest(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "trainkit.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A change to the tensors of a model folder."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)


def link_out(folder: Path) -> None:
    outside = folder.parent / "outside.json"
    shutil.move(folder / "config.json", outside)
    (folder / "config.json").symlink_to(outside)


def spoil(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Makes one value of a tensor NaN."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = float("nan")

    return change


RECORDS = {
    "disk full while saving a checkpoint": ("run", "run/config.yaml", "run/log.txt", "run/metrics.csv", "run/checkpoints")
}
"""What a run leaves that failed while saving: complete files, nothing of the checkpoint."""

NORM, HEAD = "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"

CASES: dict[str, tuple[Callable[[Inputs], list[str]], tuple[str, ...]]] = {
    # missing files
    "prompts missing": (lambda it: it.distill(prompts="nowhere.jsonl"), ("nowhere.jsonl", "give an existing file")),
    "training file missing": (lambda it: it.fit(data__train="nowhere.jsonl"), ("nowhere.jsonl", "give an existing file")),
    "target missing": (
        lambda it: it.generate(target="nowhere"),
        ("nowhere: no config.json", "give a Hugging Face model folder"),
    ),
    "target of a recipe missing": (lambda it: it.fit(model__target="nowhere"), ("nowhere", "give")),
    "drafter missing": (lambda it: it.generate(drafter="nowhere"), ("nowhere: no such folder", "give a drafter bundle")),
    "checkpoint missing": (lambda it: it.export(Path("nowhere.ckpt")), ("nowhere.ckpt", "give")),
    "run folder for its checkpoint": (lambda it: it.export(it.run), ("is a folder; give a last.ckpt", "shards")),
    "checkpoint to resume from missing": (lambda it: it.fit(ckpt_path="nowhere.ckpt"), ("nowhere.ckpt", "give")),
    "recipe missing": (lambda it: it.fit(Path("nowhere.yaml")), ("nowhere.yaml", "give a file")),
    "prompt file missing": (lambda it: it.generate(prompt="@nowhere.txt"), ("nowhere.txt", "give")),
    # rows
    "broken JSON in training rows": (
        lambda it: it.fit(data__train=it.lines(*ROWS[:2], '{"question": "a', ROWS[3])),
        ("rows.jsonl:3", "on_bad_row"),
    ),
    "broken JSON in prompts": (lambda it: it.bench(prompts=it.lines(*ROWS[:2], "{"), limit=9), ("rows.jsonl:3", "fix")),
    "row of unknown shape": (lambda it: it.alpha(data=it.lines(ROWS[0], {"q": 1})), ("rows.jsonl:2", "'q'", "column mapping")),
    "prompt of unknown shape": (lambda it: it.distill(prompts=it.lines({"q": 1})), ("rows.jsonl:1", "'q'", "column mapping")),
    "id of a validation row outside the vocabulary": (
        lambda it: it.fit(data__validation=it.lines(ROWS[0], {"input_ids": [1, 320], "loss_mask": [0, 1]})),
        ("rows.jsonl:2", "token id 320 is outside the vocabulary of 320", "fix this row"),
    ),
    "id outside the vocabulary by another tokenizer": (
        lambda it: it.fit(data__tokenizer=it.other, data__validation=it.lines({"input_ids": [1, 399], "loss_mask": [0, 1]})),
        ("rows.jsonl:1", "token id 399 is outside the vocabulary of 320", "fix this row"),
    ),
    "blank validation file": (
        lambda it: it.fit(data__validation=it.lines("", " ")),
        ("rows.jsonl", "validation: no usable row", "give rows"),
    ),
    "half of a character in training rows": (
        lambda it: it.fit(data__train=it.lines('{"text": "bad \\ud83d emoji"}')),
        ("rows.jsonl:1", "lone surrogate", "on_bad_row"),
    ),
    "half of a character in prompts": (
        lambda it: it.distill(prompts=it.lines('{"prompt": "bad \\ud83d emoji"}')),
        ("rows.jsonl:1", "lone surrogate", "fix"),
    ),
    "half of a character in a prompt": (lambda it: it.generate(prompt="bad \udcff"), ("prompt", "lone surrogate", "UTF-8")),
    "half of a character in a raw prompt": (
        lambda it: it.generate(prompt="bad \udcff", raw="true"),
        ("prompt", "lone surrogate", "UTF-8"),
    ),
    "half of a character in a stop string": (lambda it: it.generate(stop="\udcff"), ("--stop", "lone surrogate", "UTF-8")),
    "chat templates without a default": (
        lambda it: it.fit(data__tokenizer=it.model(name_templates)),
        ("model: has the chat templates rag, tool_use", "chat_template.jinja"),
    ),
    "rows that hold an image": (
        lambda it: it.alpha(data=it.lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]})),
        ("rows.jsonl:1", "messages[0].content[0] is of type 'image'", "only parts of type 'text'"),
    ),
    "folder without data": (lambda it: it.alpha(data=occupied(it)), ("occupied: holds no data file", "give a folder with")),
    "temperatures without brackets": (lambda it: it.distill(temperatures="0,1"), ("temperatures", "0,1", "write [0,1]")),
    **{
        f"negative limit of {name}": (
            lambda it, name=name: getattr(it, name)(**{"data__limit" if name == "fit" else "limit": -1}),
            ("limit", "-1", "at least 1"),
        )
        for name in ("fit", "distill", "bench", "alpha", "trim")
    },
    "no prompts to mix": (
        lambda it: it.fit(
            it.recipe(data={"class_path": "MixtureData", "init_args": {"weights": {"draft": 1.0}}}),
            **{"data.prompts": it.rows, "data.validation": it.rows, "data.limit_prompts": 0},
        ),
        ("data.limit_prompts", "0", "at least 1"),
    ),
    "empty training file": (lambda it: it.fit(data__train=it.lines(name="empty.jsonl")), ("empty.jsonl", "give")),
    "only blank prompts": (lambda it: it.distill(prompts=it.lines("", "  ", "")), ("rows.jsonl", "no prompts", "use a file")),
    "only blank rows": (lambda it: it.trim(text=it.lines("", " \t", "")), ("rows.jsonl", "no usable row", "give")),
    "no assistant turn": (
        lambda it: it.alpha(data=it.lines(CHAT, {"messages": CHAT["messages"][:1]})),
        ("rows.jsonl:2", "no assistant turn", "on_bad_row"),
    ),
    "no chat template": (
        lambda it: it.fit(
            data__train=it.lines(CHAT), data__tokenizer=it.model(lambda path: (path / "chat_template.jinja").unlink())
        ),
        ("no chat template", "model", "add a chat_template.jinja"),
    ),
    "column that is not there": (lambda it: it.alpha(columns="{prompt: query, response: answer}"), ("rows.jsonl:1", "query")),
    "column name of no format": (lambda it: it.distill(columns="{promt: question}"), ("columns", "promt", "choose from")),
    "validation share out of range": (lambda it: it.fit(data__validation_share=1.5), ("validation_share", "1.5", "below 1")),
    "unknown kind of file": (lambda it: it.alpha(data=it.write("rows.xml", "<a/>")), ("rows.xml", "use .jsonl")),
    "rows that are no UTF-8": (
        lambda it: it.bench(prompts=it.copy(it.rows, "latin.jsonl", lambda p: p.write_bytes(b'{"text": "\xe9"}'))),
        ("latin.jsonl:1", "UTF-8", "fix"),
    ),
    # recipes and flags
    "unknown key in a recipe": (
        lambda it: it.fit(it.recipe(**{"trainer.max_stpes": 3})),
        ("trainer.max_stpes", "did you mean trainer.max_steps?"),
    ),
    "unknown argument in a recipe": (
        lambda it: it.fit(it.recipe(data={"class_path": "TextData", "init_args": {"train": "x", "lenght": 3}})),
        ("lenght", "did you mean length?"),
    ),
    "unknown flag": (lambda it: it.generate(temprature=1), ("--temprature", "did you mean --temperature?")),
    "unknown command": (lambda it: ["distil", "--target", "x"], ("'distil'", "did you mean distill?")),
    "wrong type of a flag": (lambda it: it.bench(limit="many"), ("limit", "expected int", "many")),
    "broken YAML": (
        lambda it: it.fit(it.write("recipe.yaml", "model: [\n  a: {\n")),
        ("recipe.yaml:3", "not YAML", "fix the file"),
    ),
    "unknown class in a recipe": (
        lambda it: it.fit(it.recipe(model={"class_path": "DraftModul", "init_args": {}})),
        ("model", "DraftModul", "did you mean"),
    ),
    "unknown loss": (lambda it: it.fit(model__divergence="ForwardKl"), ("model", "ForwardKl", "did you mean ForwardKL")),
    "sizes that no drafter has": (lambda it: it.fit(model__drafter__hidden_size=63), ("drafter", "63", "init: scratch")),
    "no steps": (lambda it: it.fit(trainer__max_steps=0), ("trainer.max_steps", "0", "at least 1")),
    "no temperatures": (lambda it: it.alpha(temperatures="[]"), ("--temperatures", "at least one")),
    "fewer states than one": (lambda it: it.fit(model__teacher_top_k=0), ("teacher_top_k", "0", "between 1 and")),
    "batch of none": (lambda it: it.fit(data__batch_size=0), ("batch_size", "0", "at least 1")),
    "null where a number must stand": (
        lambda it: it.fit(model__warmup_steps="null"),
        ("model.warmup_steps", "null", "leave the key out"),
    ),
    "unknown source of text": (
        lambda it: it.fit(it.recipe(data={"class_path": "MixtureData", "init_args": {"weights": {"corpse": 1.0}}})),
        ("weights", "corpse", "corpus"),
    ),
    "old name of a class": (
        lambda it: it.fit(it.recipe(data={"class_path": "PolicyData", "init_args": {"weights": {"corpus": 1.0}}})),
        ("PolicyData is now called MixtureData",),
    ),
    "old name of a class in a flag": (lambda it: it.fit(data="PolicyData"), ("PolicyData is now called MixtureData",)),
    "data for another module": (
        lambda it: it.fit(it.recipe(data={"class_path": "AcceptanceData", "init_args": {"train": "x"}})),
        ("DraftModule cannot train on AcceptanceData", "set data.class_path: TextData"),
    ),
    "written text without a draft": (
        lambda it: it.fit(
            it.recipe(model=LANGUAGE, data={"class_path": "MixtureData", "init_args": {"weights": {"draft": 1.0}}}),
            **{"data.prompts": it.rows, "data.validation": it.rows},
        ),
        ("data.weights", "set model.class_path: DraftModule"),
    ),
    "wrong verification": (lambda it: it.bench(verify="sloppy"), ("verify", "sloppy", "coupled, residual")),
    "negative temperature": (lambda it: it.generate(temperature=-1), ("temperature", "-1", "at least 0")),
    "negative temperature in a list": (lambda it: it.distill(temperatures="[0,-0.5]"), ("temperature", "-0.5", "at least 0")),
    "top_p out of range": (lambda it: it.distill(top_p=1.5), ("top_p", "1.5", "at most 1")),
    "one token in a bench": (lambda it: it.bench(max_new_tokens=1), ("max_new_tokens", "1", "no round")),
    "depth 0 in a bench": (lambda it: it.bench(depths="[0,2]"), ("depths", "0", "at least 1")),
    "depth 0 in a recipe": (lambda it: it.fit(model__depth=0), ("model.depth", "0", "at least 1")),
    "depth 0 in alpha": (lambda it: it.alpha(depth=0, prompts=it.rows), ("depth", "0", "at least 1")),
    "depth beyond what can be held": (lambda it: it.generate(drafter=it.draft, depth=100000), ("depth", "100000", "at most")),
    "a tree that is spelt wrong": (
        lambda it: it.generate(drafter=it.draft, tree="dynamic:5"),
        ("tree dynamic:5", "[[0],[1]", "dynamic:5,4,16"),
    ),
    "a tree of too many nodes": (lambda it: it.generate(drafter=it.draft, tree="dynamic:1,4,9"), ("nodes 9", "at most 5")),
    "depth without a drafter": (lambda it: it.generate(depth=3), ("depth", "drafter", "--drafter")),
    "no such device": (lambda it: it.generate(device="gpu"), ("device", "gpu", "cpu")),
    "no such precision": (lambda it: it.distill(dtype="int8"), ("dtype", "int8", "float32")),
    "empty prompt": (lambda it: it.generate(prompt="", raw=True), ("prompt", "empty", "give")),
    "keep none of the vocabulary": (lambda it: it.trim(keep=0), ("--keep", "0", "must be")),
    "keep more than the vocabulary": (lambda it: it.trim(keep=321), ("--keep", "321", "at most all 320")),
    "keep a share above all": (lambda it: it.trim(keep=1.5), ("--keep", "1.5", "must be")),
    "packed rows longer than the positions": (lambda it: it.fit(data__length=600), ("data.length", "600", "lower data.length")),
    "processes that would train apart": (
        lambda it: torchrun(it) or it.fit(trainer__strategy="auto", trainer__devices=1),
        ("trainer.strategy", "set trainer.strategy: ddp"),
    ),
    "unknown strategy": (lambda it: it.fit(trainer__strategy="dpp"), ("dpp", "ddp")),
    "monitor of no side": (lambda it: it.fit(checkpoint__mode="most"), ("checkpoint.mode", "most", "min or max")),
    # models
    "vocabulary of another target": (
        lambda it: it.generate(target=it.other, drafter=it.draft),
        ("vocab_size 400", "320", "use the target"),
    ),
    "tokenizer of another target": (
        lambda it: it.alpha(target=it.model(lambda path: other_tokenizer(path))),
        ("model", "tokenizer", "use the target"),
    ),
    "tokenizer beyond the vocabulary": (
        lambda it: it.fit(data__tokenizer=it.other, data__train=it.lines({"text": "<|reserved_4|>" * 9}, *ROWS)),
        ("rows.jsonl:1", "320", "use the model's own tokenizer"),
    ),
    "truncated target": (lambda it: it.generate(target=it.model(cut)), ("model/model.safetensors", "copy it again")),
    "truncated target in training": (lambda it: it.fit(model__target=it.model(cut)), ("model", "copy it again")),
    "missing weight": (lambda it: it.generate(target=it.model(weights(lambda w: w.pop(NORM)))), ("model", NORM, "copy")),
    "missing weight in training": (
        lambda it: it.fit(model__target=it.model(weights(lambda w: w.pop(NORM)))),
        ("model", NORM, "copy"),
    ),
    "unexpected weight": (
        lambda it: it.distill(target=it.model(weights(lambda w: w.update(extra=torch.ones(2))))),
        ("model", "'extra'", "give"),
    ),
    "weight of another size": (
        lambda it: it.generate(target=it.model(weights(lambda w: w.update({NORM: torch.ones(2, 2)})))),
        ("model", NORM, "[2, 2]", "give"),
    ),
    "missing weight file": (
        lambda it: it.generate(target=it.model(lambda path: (path / "model.safetensors").unlink())),
        ("model.safetensors", "not found", "safetensors files"),
    ),
    "architecture not decoded": (
        lambda it: it.generate(target=it.model(config(model_type="gpt2"))),
        ("config.json", "'gpt2'", "llama, mistral, qwen2, qwen3"),
    ),
    "no transformer": (
        lambda it: it.bench(target=it.model(config(model_type="mamba", architectures=["MambaForCausalLM"]))),
        ("config.json", "'mamba'", "llama, mistral, qwen2, qwen3"),
    ),
    "config.json that is no JSON": (
        lambda it: it.generate(target=it.model(lambda path: (path / "config.json").write_text("{"))),
        ("config.json", "fix it"),
    ),
    "config.json with a wrong size": (
        lambda it: it.generate(target=it.model(config(num_hidden_layers="two"))),
        ("config.json", "num_hidden_layers"),
    ),
    "tokenizer.json that is no JSON": (
        lambda it: it.distill(target=it.model(lambda path: (path / "tokenizer.json").write_text("{"))),
        ("model", "tokenizer", "give"),
    ),
    "target without a tokenizer": (
        lambda it: it.generate(target=it.model(lambda path: [p.unlink() for p in path.glob("tokenizer*")])),
        ("model", "tokenizer", "give"),
    ),
    "NaN in the target": (lambda it: it.generate(target=it.model(weights(spoil(NORM)))), (NORM, "not finite", "copy")),
    "NaN in the target in training": (
        lambda it: it.fit(model__target=it.model(weights(spoil(NORM)))),
        ("model", "not finite", "copy"),
    ),
    "NaN in a plain draft": (lambda it: it.generate(drafter=it.model(weights(spoil(HEAD)))), (HEAD, "not finite", "copy")),
    "NaN in a checkpoint": (
        lambda it: it.export(spoiled_checkpoint(it)),
        ("decoder.norm.weight", "not finite", "export an earlier"),
    ),
    "prompt longer than the positions": (
        lambda it: it.generate(prompt="clips " * 600),
        ("tokens", "max_len 512", "shorten it"),
    ),
    "prompts longer than the positions": (
        lambda it: it.distill(prompts=it.lines({"prompt": "clips " * 600})),
        ("prompt 0", "512", "shorten"),
    ),
    # bundles
    "truncated bundle": (lambda it: it.generate(drafter=it.bundle(cut)), ("bundle/model.safetensors", "export it again")),
    "flipped byte": (lambda it: ["inspect", str(it.bundle(flip))], ("bundle/model.safetensors", "sha256", "export it again")),
    "path out of a bundle": (
        lambda it: it.trim(it.bundle(manifest(files={"../x.json": "0"}))),
        ("trainkit.json", "'../x.json'", "do not use"),
    ),
    "link out of a bundle": (
        lambda it: it.alpha(drafter=it.bundle(link_out)),
        ("bundle/config.json", "leads out", "copy the file"),
    ),
    "bundle of the future": (
        lambda it: it.generate(drafter=it.bundle(manifest(format=99))),
        ("trainkit.json", "format 99", "upgrade"),
    ),
    "no bundle": (lambda it: it.trim(it.target), ("target", "trainkit.json", "trainkit export")),
    "pickle beside a bundle": (
        lambda it: it.generate(drafter=it.bundle(lambda path: (path / "model.bin").write_bytes(payload(it)))),
        ("bundle/model.bin", "remove it"),
    ),
    "bundle of an unknown kind": (
        lambda it: it.generate(drafter=it.bundle(manifest(kind="oracle"))),
        ("trainkit.json", "'oracle'", "choose from "),
    ),
    "bundle with another argument": (
        lambda it: it.generate(drafter=it.bundle(manifest(config={"levels": 3}))),
        ("trainkit.json", "levels", "export it again"),
    ),
    "bundle with a broken target": (
        lambda it: ["inspect", str(it.bundle(manifest(target={"decoder": {}}))), "--target", str(it.target)],
        ("trainkit.json", "target", "export it again"),
    ),
    # checkpoints
    "garbage for a checkpoint": (
        lambda it: it.fit(ckpt_path=it.write("bad.ckpt", "garbage")),
        ("bad.ckpt", "not a checkpoint", "give"),
    ),
    "garbage to export": (lambda it: it.export(it.write("bad.ckpt", "garbage")), ("bad.ckpt", "not a checkpoint", "give")),
    "truncated checkpoint": (
        lambda it: it.fit(ckpt_path=it.copy(it.checkpoint, "bad.ckpt", lambda path: os.truncate(path, 5000))),
        ("bad.ckpt", "not a checkpoint", "give"),
    ),
    "truncated checkpoint to export": (
        lambda it: it.export(it.copy(it.checkpoint, "bad.ckpt", lambda path: os.truncate(path, 5000))),
        ("bad.ckpt", "not a checkpoint", "give"),
    ),
    "checkpoint that would run code": (
        lambda it: it.fit(ckpt_path=it.copy(it.checkpoint, "bad.ckpt", lambda path: poison(it, path))),
        ("bad.ckpt", "not a checkpoint", "give"),
    ),
    "pickle that would run code": (
        lambda it: it.export(it.copy(it.checkpoint, "bad.ckpt", lambda path: path.write_bytes(payload(it)))),
        ("bad.ckpt", "not a checkpoint", "give"),
    ),
    "checkpoint of another program": (
        lambda it: it.fit(ckpt_path=it.copy(it.checkpoint, "bad.ckpt", lambda path: torch.save({"state_dict": {}}, path))),
        ("bad.ckpt", "not a checkpoint", "give"),
    ),
    "resumed with another target": (
        lambda it: it.fit(model__target=it.other, ckpt_path=it.checkpoint),
        ("last.ckpt", "target", "400", "resume with"),
    ),
    "resumed with another class": (lambda it: it.fit(ckpt_path=it.language), ("last.ckpt", "LanguageModule", "resume with")),
    "resumed with other data": (
        lambda it: it.fit(data__train=it.lines(*ROWS[:9]), ckpt_path=it.checkpoint),
        ("data_fingerprint", "resume with the same data"),
    ),
    # output folders
    "two runs in one folder": (lambda it: it.fit(trainer__default_root_dir=it.run), ("run: holds a run already", "--resume")),
    "export onto something else": (
        lambda it: it.export(out=occupied(it)),
        ("occupied: exists and is not a bundle", "choose another folder"),
    ),
    "trim onto something else": (
        lambda it: it.trim(out=occupied(it)),
        ("occupied: exists and is not a bundle", "choose another folder"),
    ),
    "distill into another set": (lambda it: it.distill(out=begun(it)), ("--out", "temperatures [1.0]", "another folder")),
    "distill onto something else": (lambda it: it.distill(out=occupied(it)), ("occupied", "use a new folder")),
    "no server": (
        lambda it: it.distill(base_url=f"http://127.0.0.1:{closed_port()}/v1"),
        ("127.0.0.1", "no answer", "check that the server runs"),
    ),
    "no server for a model that is named": (
        lambda it: it.distill(base_url=f"http://127.0.0.1:{closed_port()}/v1", model="x"),
        ("127.0.0.1", "no answer", "check that the server runs"),
    ),
    "no address": (lambda it: it.distill(base_url="localhost:8000"), ("localhost:8000", "http://HOST:PORT/v1")),
    "disk full while exporting": (lambda it: limited(it.export()), ("out: cannot be written", "File too large", "free space")),
    "disk full while exporting a model": (
        lambda it: limited(it.export(it.language)),
        ("out: cannot be written", "File too large", "free space"),
    ),
    "disk full while saving a checkpoint": (
        lambda it: limited(it.fit()),
        ("run/checkpoints/last.ckpt: cannot be written", "File too large", "free space"),
    ),
    "disk full while trimming": (
        lambda it: failing(it, errno.ENOSPC, "trainkit.json") or it.trim(keep=0.5),
        ("out", "No space left", "free space"),
    ),
    "disk full while distilling": (
        lambda it: failing(it, errno.ENOSPC, "distill.json") or it.distill(),
        ("out", "No space left", "free space"),
    ),
    "read-only folder for an export": (
        lambda it: failing(it, errno.EROFS, "out") or it.export(),
        ("out", "Read-only file system", "another path"),
    ),
    "read-only folder for a set": (
        lambda it: failing(it, errno.EROFS, "out") or it.distill(),
        ("out", "Read-only file system", "another path"),
    ),
    "no permission for a run": (
        lambda it: failing(it, errno.EACCES, "run") or it.fit(),
        ("run", "Permission denied", "another folder"),
    ),
    "no permission for a result": (
        lambda it: failing(it, errno.EACCES, "alpha.json") or it.alpha(),
        ("alpha.json", "Permission denied", "another"),
    ),
    "no folder for a result": (lambda it: it.alpha(json=it.folder / "no" / "alpha.json"), ("no/alpha.json", "make")),
}


def name_templates(folder: Path) -> None:
    """Replaces the chat template by two with names."""
    (folder / "additional_chat_templates").mkdir()
    template = (folder / "chat_template.jinja").rename(folder / "additional_chat_templates" / "rag.jinja")
    shutil.copy(template, template.with_stem("tool_use"))


def torchrun(it: Inputs) -> None:
    started = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in (started | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}).items():
        it.patch.setenv(name, value)


def other_tokenizer(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["merges"] = values["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(values))


def spoiled_checkpoint(it: Inputs) -> Path:
    values = torch.load(it.checkpoint, weights_only=True)
    values["state_dict"]["drafter.decoder.norm.weight"][0] = float("nan")
    torch.save(values, it.folder / "nan.ckpt")
    return it.folder / "nan.ckpt"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.marker),))


def payload(it: Inputs) -> bytes:
    return pickle.dumps(Payload(it.folder / "executed"))


def poison(it: Inputs, path: Path) -> None:
    """Replaces the pickle of a checkpoint by the payload."""
    with zipfile.ZipFile(it.checkpoint) as whole, zipfile.ZipFile(path, "w") as bad:
        for name in whole.namelist():
            bad.writestr(name, payload(it) if name.endswith("data.pkl") else whole.read(name))


def occupied(it: Inputs) -> Path:
    (it.folder / "occupied").mkdir()
    (it.folder / "occupied" / "thesis.txt").write_text("years")
    return it.folder / "occupied"


def begun(it: Inputs) -> Path:
    assert cli.main(it.distill(out=it.folder / "set", temperatures="[1]")) == 0
    return it.folder / "set"


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def failing(it: Inputs, code: int, name: str) -> None:
    """From now on, writing a file or making a folder of this name raises the error that the system would raise."""

    def hit(path: Any) -> bool:
        parts = Path(os.fsdecode(path)).parts if isinstance(path, (str, bytes, os.PathLike)) else ()
        return any(part.strip(".").split(".")[0] == name.split(".")[0] for part in parts[-1:])

    def wrap(function: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            if hit(path) and writes(*args, **kwargs):
                raise OSError(code, os.strerror(code), os.fspath(path))
            return function(path, *args, **kwargs)

        return wrapped

    def opens(mode: str = "r", *_: Any, **more: Any) -> bool:
        return any(letter in more.get("mode", mode) for letter in "wax+")

    it.patch.setattr(os, "mkdir", wrap(os.mkdir, lambda *_, **__: True))
    it.patch.setattr(builtins, "open", wrap(open, opens))
    it.patch.setattr(io, "open", wrap(io.open, opens))


def limited(arguments: list[str]) -> list[str]:
    """Until the row is done, the system refuses to write files beyond 10 kB, as a full disk would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return arguments


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file and folder, hidden ones included."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size if path.is_file() else 0, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", CASES)
def test_mistake_gives_one_line_and_leaves_nothing(name, sound, tmp_path, monkeypatch, capsys):
    """A mistake gives one error line with the fix, exit code 2, and changes no file."""
    monkeypatch.delenv("TRAINKIT_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    make, parts = CASES[name]
    values = {item: getattr(sound, item) for item in sound.__dataclass_fields__}
    arguments = make(Inputs(**values | {"folder": tmp_path, "patch": monkeypatch}))
    capsys.readouterr()
    before = tree(tmp_path), tree(sound.run), tree(sound.draft)
    try:
        code = cli.main(arguments)
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    err = capsys.readouterr().err
    assert err.startswith("trainkit: error: ") and err.count("\n") == 1, err
    assert code == 2
    for part in parts:
        assert part in err, err
    left = {path: state for path, state in tree(tmp_path).items() if path not in RECORDS.get(name, ())}
    assert (left, tree(sound.run), tree(sound.draft)) == before


def test_payloads_would_create_their_marker(sound, tmp_path):
    """The payloads work: a reader that trusts these files runs them. Otherwise the rows above would prove nothing."""
    it = Inputs(**{item: getattr(sound, item) for item in sound.__dataclass_fields__} | {"folder": tmp_path})
    pickle.loads(payload(it))
    (tmp_path / "executed").rmdir()
    poison(it, tmp_path / "bad.ckpt")
    torch.load(tmp_path / "bad.ckpt", weights_only=False)
    assert (tmp_path / "executed").is_dir()
