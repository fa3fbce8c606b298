"""The repository's small data set (`data/tiny`), and chat templates that its tokenizer is tested with."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ROOT / "data" / "tiny"

NO_SPANS = (
    "{% for m in messages %}<|{{ 'assistant' if m['role'] == 'assistant' else 'user' }}|>{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRIPS_THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
