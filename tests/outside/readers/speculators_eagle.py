"""The unrolled forward of an EAGLE-3 draft in vLLM's speculators library.

Request: `folder`, `tokens` [T + 1], `hidden` [T, A * H] (taps of positions 0..T-1), `steps`. Answer: `logits` [steps, T, K],
the tap ids, `d2t`, the verifier's name, and whether the verifier's head was loaded.
"""

import json
import sys
from importlib.metadata import version

import torch
from speculators.models.eagle3 import Eagle3DraftModel


@torch.inference_mode()
def main(request):
    model = Eagle3DraftModel.from_pretrained(request["folder"], dtype=torch.float32).eval()
    logits = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output[0].tolist()))
    tokens = torch.tensor([request["tokens"][1:]])
    model(
        hidden_states=torch.tensor([request["hidden"]]),
        input_ids=tokens,
        document_ids=torch.zeros_like(tokens),
        position_ids=torch.arange(tokens.shape[1])[None],
        ttt_steps=request["steps"],
    )
    answer = {"logits": logits, "taps": model.target_layer_ids, "d2t": None if model.d2t is None else model.d2t.tolist()}
    answer["verifier"] = model.config.speculators_config.verifier.name_or_path
    answer["verifier_loaded"] = not bool(model.verifier_lm_head.weight.isnan().any())
    print(json.dumps({"version": version("speculators"), **answer}))


main(json.load(sys.stdin))
