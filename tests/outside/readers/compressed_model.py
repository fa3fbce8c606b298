"""Quantises a folder's linear layers with compressed-tensors and saves it, or says what it finds in a folder.

Request: `folder` and either `out`, to write an int8 copy, or nothing more. Answer: `quantization_config` of config.json and,
for a folder that was only read, its logits for `ids`.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main(request):
    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32)
    if out := request.get("out"):
        weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="int-quantized")
        apply_quantization_config(model, config)
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                module.weight_scale.copy_(module.weight.abs().amax(1, keepdim=True) / 127)
        ModelCompressor.from_pretrained_model(model, "int-quantized").compress_model(model)
        model.save_pretrained(out)
        ModelCompressor.from_pretrained_model(model, "int-quantized").update_config(out)
    found = json.loads((Path(request.get("out") or request["folder"]) / "config.json").read_text())
    answer = {"quantization_config": found.get("quantization_config"), "version": version("compressed-tensors")}
    if "ids" in request:
        answer["logits"] = model(torch.tensor([request["ids"]])).logits[0].tolist()
    print(json.dumps(answer))


main(json.load(sys.stdin))
