"""Quantises a model by AWQ with llmcompressor. Run as a script by an interpreter that has llmcompressor; not imported.

The argument is a JSON file of `compress.awq`, which starts this. Only packages that llmcompressor requires are used here.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # pyright: ignore
from datasets import Dataset
from llmcompressor import oneshot  # pyright: ignore
from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore
from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore
from llmcompressor.pipelines.cache import IntermediatesCache  # pyright: ignore
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    if not torch.accelerator.is_available():  # version 0.14 pins memory for a GPU even where there is none
        IntermediatesCache.pin_memory = lambda *_, **__: None
    tokens_ST = load_file(job["tokens"])["tokens"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    weights = QuantizationArgs(**job["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model.to(job["device"]),
        dataset=Dataset.from_dict({"input_ids": tokens_ST.tolist()}),
        recipe=[AWQModifier(), QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])],
        num_calibration_samples=len(tokens_ST),
        max_seq_length=tokens_ST.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    model.save_pretrained(job["out"], save_compressed=True)
