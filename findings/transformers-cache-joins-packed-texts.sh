#!/usr/bin/env bash
# transformers, two texts packed into one row whose position_ids start again at 0: with use_cache=False the second
# text does not see the first, and its logits are those of the text alone. By default (use_cache=True, also in train()
# and with labels) it attends to the first text, and its logits differ by 0.5. Texts are told apart only where no
# cache object exists, and the forward pass creates an empty one itself. An attention_mask of ones, which tokenizers
# return, also joins them. Nothing is raised or logged.
# A cache is documented as a means to speed up decoding: one forward pass without a past should not depend on it.
# "Padding-free training" advises against an attention_mask and does not mention use_cache.
# use_cache=False without an attention_mask is right. Here with Qwen3, SDPA and eager attention; seen alike with
# transformers 4.57.6 (SDPA) and 5.24.0.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'transformers==5.24.0' 2>/dev/null
cat >"$folder/pack.py" <<'PYTHON'
import sys

import torch
import transformers

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
config = transformers.Qwen3Config(vocab_size=50, num_attention_heads=2, num_key_value_heads=2, **sizes)
model = transformers.Qwen3ForCausalLM(config).eval()
first, second = torch.arange(1, 6), torch.arange(10, 17)
packed = {
    "input_ids": torch.cat([first, second])[None],
    "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None],
}
ones = torch.ones_like(packed["input_ids"])
print("torch", torch.__version__, "transformers", transformers.__version__)


@torch.no_grad()
def off(**options):
    """Largest difference of the second text's logits from those without the first text."""
    alone = model(input_ids=second[None]).logits
    return float((model(**packed, **options).logits[:, len(first) :] - alone).abs().max())


def eager():
    model.set_attn_implementation("eager")
    found = off()
    model.set_attn_implementation("sdpa")
    return found


seen = {
    "use_cache=False": off(use_cache=False),
    "default": off(),
    "default, eager attention": eager(),
    "use_cache=False, attention_mask of ones": off(use_cache=False, attention_mask=ones),
}
model.train()
seen["train(), labels, default"] = off(labels=packed["input_ids"])
for what, difference in seen.items():
    print(f"{what}: logits of the second text off by {difference:.1e}")
sys.exit(0 if [difference < 1e-5 for difference in seen.values()] == [True, False, False, False, False] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/pack.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
