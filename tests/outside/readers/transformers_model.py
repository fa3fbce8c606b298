"""Logits of a folder in transformers, and its greedy text, alone or assisted by a draft model.

Request: a list of jobs with `model`, and either `ids` (one row: answers `logits`) or `prompts`, `new_tokens` and, with a draft,
`assistant` and `depth` (answers `tokens` and `accepted`).
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import candidate_generator


def load(folder):
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@torch.inference_mode()
def answer(job):
    model = load(job["model"])
    if "ids" in job:
        return {"logits": model(torch.tensor([job["ids"]])).logits[0].tolist()}
    matches, extra, tokens, accepted = [], {}, [], []
    config = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if job.get("assistant"):
        kind = candidate_generator.AssistedCandidateGenerator
        update = kind.update_candidate_strategy

        def recording(self, input_ids, scores, num_matches):
            matches.append(int(num_matches))
            return update(self, input_ids, scores, num_matches)

        kind.update_candidate_strategy = recording
        assistant = extra["assistant_model"] = load(job["assistant"])
        schedule = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
        assistant.generation_config = GenerationConfig(**config, num_assistant_tokens=job["depth"], **schedule)
    model.generation_config = GenerationConfig(**config)
    for prompt in job["prompts"]:
        # The first token apart: its round has no draft in trainkit, and the rounds after it begin at the same positions.
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
        ids = torch.tensor([[*prompt, first]])
        start = len(matches)
        row = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["new_tokens"] - 1, **extra)
        tokens.append(row[0, len(prompt) :].tolist())
        accepted.append(sum(matches[start:]))
    if extra:
        kind.update_candidate_strategy = update
    return {"tokens": tokens, "accepted": accepted}


print(json.dumps({"version": transformers.__version__, "answers": [answer(job) for job in json.load(sys.stdin)["jobs"]]}))
