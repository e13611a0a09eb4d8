#!/usr/bin/env bash
# Tunix, DPOTrainer with algorithm="orpo": the preference term of the loss tells which answer is shorter, not which one the model
# prefers. Of a chosen answer of 20 tokens and a rejected one of 180 it is 0, its gradient is 0 and rewards/accuracy is 1, even if
# the model gives each token of the rejected answer 0.6 and of the chosen one 0.4. The other way round it is 74 to 155, at 0.6 for
# the chosen ones as well, where the formula has 0.37 to 1.18. Only for equal lengths has it the right sign, and even then it is
# that of 100 tokens: 40 or 0, with a gradient of all or nothing.
# The odds are those of the summed log-probabilities, of the whole text, that is exp(-18) against exp(-92): 1 - P is 1, and what is
# left is the difference of two sums. The paper that the documentation refers to, arXiv 2403.07691, divides the sums by the
# length first (equation 3), as does TRL's ORPOTrainer, which the source says it follows exactly; the other term of the loss does.
# A reader expects odds of a token, near 1. Nothing is raised and rewards/accuracy is that of a good model. It hurts on the usual
# preference data, where chosen answers are longer: training pushes long answers down, and lambda_orpo has to be 100 times smaller.
# Right is the formula below, as a loss of one's own. Seen with google-tunix 0.1.7, the newest release; its later sources have an
# option for it. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps 'google-tunix==0.1.7' 2>/dev/null
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'flax==0.12.8' 'optax==0.2.8' 'numpy==2.4.6' 'qwix==0.1.8' \
  'google-metrax==0.2.4' 'grain==0.2.18' 'orbax-checkpoint==0.12.8' 'huggingface_hub==2.4.0' 'jaxtyping==0.3.11' \
  'pandas==3.1.1' 'perfetto==0.59.1' 'pillow==13.0.0' 'sentencepiece==0.2.3' 'tqdm==4.70.1' 2>/dev/null
cat >"$folder/orpo.py" <<'PYTHON'
import importlib.metadata
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.sft.dpo import dpo_trainer

LENGTH, VOCABULARY, WEIGHT = 200, 16, 0.1
print("google-tunix", importlib.metadata.version("google-tunix"), "flax", flax.__version__, "jax", jax.__version__)


class Model(nnx.Module):
    """Gives every token of the first row one probability, of the second another."""

    def __init__(self, probabilities):
        others = (1 - np.array(probabilities)) / (VOCABULARY - 1)
        logits = np.zeros((2, 1 + LENGTH, VOCABULARY))
        logits[..., 1] = np.log(np.array(probabilities) / others)[:, None]
        self.logits = nnx.Param(jnp.asarray(logits, jnp.float32))

    def __call__(self, tokens, positions=None, attention_mask=None, cache=None):
        return self.logits[...], cache


def loss(lengths, probabilities):
    """Preference term, its gradient (sum of sizes), rewards/accuracy and the supervised term for a chosen and a rejected answer."""
    ids = jnp.ones((2, 1 + LENGTH), jnp.int32)
    example = dpo_trainer.TrainExample(
        input_ids=ids,
        positions=jnp.zeros_like(ids),
        attention_mask=None,
        ref_chosen_logps=None,
        ref_rejected_logps=None,
        completion_mask=jnp.asarray(np.arange(LENGTH) < np.array(lengths)[:, None], jnp.float32),
        logits_to_keep=LENGTH,
    )

    def preference(model):
        _, parts = dpo_trainer.dpo_loss_fn(model, example, algorithm="orpo", lambda_orpo=WEIGHT)
        return parts["or_loss"], parts

    (value, parts), gradient = nnx.value_and_grad(preference, has_aux=True)(Model(probabilities))
    size = float(jnp.abs(gradient["logits"][...]).sum())
    return float(value), size, float(parts["rewards/accuracy"]), float(parts["sft_loss"])


def formula(probabilities):
    """Equations 3 to 6 of the paper: log P is the mean over the tokens, so that P is the probability of a token here."""
    chosen, rejected = probabilities
    return float(np.log1p(np.exp(-np.log(chosen / (1 - chosen)) + np.log(rejected / (1 - rejected)))))


results = {}
for lengths in ((100, 100), (20, 180), (180, 20)):
    for probabilities in ((0.6, 0.4), (0.5, 0.5), (0.4, 0.6)):
        value, size, accuracy, supervised = results[lengths, probabilities] = loss(lengths, probabilities)
        print(f"chosen {lengths[0]:3d} tokens of probability {probabilities[0]}", end=", ")
        print(f"rejected {lengths[1]:3d} of {probabilities[1]}", end=": ")
        print(f"preference loss {value:6.2f}, gradient {size:6.2f}, accuracy {accuracy:.0f}", end="; ")
        print(f"formula {formula(probabilities):.2f}")
short = [results[(20, 180), each] for each in ((0.6, 0.4), (0.5, 0.5), (0.4, 0.6))]
long = [results[(180, 20), each] for each in ((0.6, 0.4), (0.5, 0.5), (0.4, 0.6))]
ok = all(value < 1e-6 and size < 1e-6 and accuracy == 1 for value, size, accuracy, _ in short)
ok &= all(value > 50 and size > 50 and accuracy == 0 for value, size, accuracy, _ in long)
equal = results[(100, 100), (0.5, 0.5)]
ok &= abs(equal[0] - formula((0.5, 0.5))) < 1e-5 and results[(100, 100), (0.4, 0.6)][0] > 20
ok &= all(abs(each[3] + np.log(probabilities[0])) < 1e-4 for (_, probabilities), each in results.items())
sys.exit(0 if ok else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/orpo.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
