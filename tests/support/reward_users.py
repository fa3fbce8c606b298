"""Reward functions as users of huggingface/trl write them; imports little, because processes of one function load it."""

import asyncio
import re
import time


def unique_letters(completions, **kwargs):
    """Number of different characters, for completions that are texts."""
    return [float(len(set(completion))) for completion in completions]


def tagged(completions, **kwargs):
    """Whether chat completions have the two tags."""
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think><answer>.*?</answer>$", content) else 0.0 for content in contents]


def boxed(completions, ground_truth, **kwargs):
    """Whether the box holds the text of a column."""
    found = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    return [1.0 if match and match.group(1) == truth else 0.0 for match, truth in zip(found, ground_truth, strict=True)]


def only_maths(prompts, completions, task, **kwargs):
    """A number for rows of one kind, None for all others."""
    return [float(len(completion)) if kind == "math" else None for completion, kind in zip(completions, task, strict=True)]


def more_tokens(completion_ids, trainer_state, log_extra, log_metric):
    """Takes no other argument, depends on the step and logs."""
    lengths = [len(ids) for ids in completion_ids]
    log_extra("tokens", lengths)
    log_metric("mean_tokens", sum(lengths) / len(lengths))
    return [length * trainer_state.global_step for length in lengths]


async def remote(prompts, completions, **kwargs):
    """As if it asked a server."""
    await asyncio.sleep(0.01)
    return [1.0 if completion else 0.0 for completion in completions]


def endless(completions, column=None, **kwargs):
    """Hangs if any completion is `hang`."""
    while "hang" in completions:
        time.sleep(0.01)
    return [1.0] * len(completions)


def killed(completions, **kwargs):
    """Ends its process."""
    import os

    os._exit(7)


def raising(completions, **kwargs):
    """Raises if any completion is `bad`."""
    if "bad" in completions:
        raise RuntimeError("no connection\nto the server")
    return [1.0] * len(completions)
