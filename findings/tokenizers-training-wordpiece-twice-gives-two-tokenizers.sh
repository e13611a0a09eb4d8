#!/usr/bin/env bash
# tokenizers, WordPieceTrainer: training twice on the same texts, in one process or two, gives two tokenizers. The tokens that
# continue a word ("##a") get other ids each time, and where pairs are equally frequent other tokens are merged, so that the same
# sentence is cut differently. A model trained with the first reads noise with the second, and no seed can be set.
# BPE, WordLevel and Unigram, trained on the same texts, encode alike each time; BPE with continuing_subword_prefix, on which the
# trainer of WordPiece rests, varies as well. It numbers such pieces in the order of a hash map, and breaks ties by number.
# The documentation of training names no randomness, and a reader expects that a tokenizer that is lost can be made again from
# its texts, or on each host from the same ones: hosts that train their own disagree on ids without an error.
# Right is to train once and to keep the file. Here with tokenizers 0.23.3. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'tokenizers==0.23.3' 2>/dev/null
cat >"$folder/train.py" <<'PYTHON'
import importlib.metadata
import random
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

RUNS = 12
print("tokenizers", importlib.metadata.version("tokenizers"))
random.seed(0)
words = ["".join(random.choices("abcdefgh", k=random.randint(2, 7))) for _ in range(400)]
texts = [" ".join(random.choices(words, k=20)) for _ in range(200)]
unseen = [" ".join("".join(random.choices("abcdefgh", k=random.randint(4, 12))) for _ in range(10)) for _ in range(200)]
options = {"show_progress": False, "special_tokens": ["[UNK]"]}
KINDS = {
    "WordPiece": lambda size: (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=size, **options)),
    "BPE with prefix ##": lambda size: (
        models.BPE(unk_token="[UNK]", continuing_subword_prefix="##"),
        trainers.BpeTrainer(vocab_size=size, continuing_subword_prefix="##", **options),
    ),
    "BPE": lambda size: (models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(vocab_size=size, **options)),
    "WordLevel": lambda size: (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(vocab_size=size, **options)),
    "Unigram": lambda size: (models.Unigram(), trainers.UnigramTrainer(vocab_size=size, unk_token="[UNK]", **options)),
}


FEW = ["a photo of a red circle left of a blue square"]


def train(kind, texts=texts, size=300):
    model, trainer = KINDS[kind](size)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def compare(kind):
    """Trains several times; how many vocabularies, and the share of texts that the first and another run encode alike."""
    first, *others = [train(kind) for _ in range(RUNS)]
    vocabularies = {tuple(sorted(one.get_vocab().items())) for one in (first, *others)}
    pairs = [(one, text) for one in others for text in unseen]
    ids = sum(one.encode(text).ids == first.encode(text).ids for one, text in pairs) / len(pairs)
    tokens = sum(one.encode(text).tokens == first.encode(text).tokens for one, text in pairs) / len(pairs)
    alike = f"{ids:6.1%} of texts get the same ids, {tokens:6.1%} the same tokens"
    print(f"{kind:<20} {RUNS} times: {len(vocabularies):>2} vocabularies; {alike}")
    return len(vocabularies), ids, tokens


results = {kind: compare(kind) for kind in KINDS}
first, second = train("WordPiece"), train("WordPiece")
text = unseen[0].split()[0]
print(f"{text!r} encoded by one training:", *first.encode(text).tokens)
print("its ids, decoded by the next:   ", *map(second.id_to_token, first.encode(text).ids))
cuts = {kind: {tuple(train(kind, FEW, 40).encode("circle lure").tokens) for _ in range(60)} for kind in KINDS}
print(f"trained 60 times on one caption, ways to cut 'circle lure':", {kind: len(ways) for kind, ways in cuts.items()})
print(*(" ".join(way) for way in sorted(cuts["WordPiece"])), sep="\n")
vary, stay = ("WordPiece", "BPE with prefix ##"), ("BPE", "WordLevel", "Unigram")
as_found = all(results[kind][0] > 1 and results[kind][1] < 0.5 and len(cuts[kind]) > 1 for kind in vary)
sys.exit(0 if as_found and all(results[kind][1] == 1 and len(cuts[kind]) == 1 for kind in stay) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/train.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
