"""The text tokenizer of a checkpoint: byte-level BPE (Qwen2/Qwen3) with added tokens.

Source: transformers `Qwen2TokenizerFast`, based on the same `tokenizers` library.
Differs from the reference:
1. A declared id that does not fit the vocabulary is an error; the reference silently renumbers the token.
2. Truncation and padding settings in tokenizer.json are ignored.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from blip3o_jax import files
from blip3o_jax.errors import UserError, require

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with at most one preceding character
    r"|\p{N}"  # single digits
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # punctuation
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # line ends, then other white space
)
"""The pieces that Qwen2 splits text into before BPE."""

DEFAULT_SPECIAL = "<|endoftext|>"
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
NAMED_SPECIALS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


class Tokenizer:
    """Converts between text and ids. Special tokens in a text are parsed; none are added around it."""

    def __init__(self, backend: tokenizers.Tokenizer, pad_token: str, side_files: Mapping[str, bytes] | None = None):
        """Wraps a `tokenizers.Tokenizer`, and turns off its truncation and padding.

        Args:
          side_files: name -> content of files that `save` writes back unchanged.
        """
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._pad_token = pad_token
        self._side_files = dict(side_files or {})

    @classmethod
    def from_directory(cls, path: str | pathlib.Path) -> "Tokenizer":
        """Reads tokenizer.json, or vocab.json and merges.txt, with the added tokens declared in their side files.

        Raises:
          UserError: a missing or broken file, or added tokens whose ids do not fit the vocabulary.
        """
        directory = pathlib.Path(path)
        side_files = {
            name: files.read_bytes(directory / name, "tokenizer") for name in SIDE_FILES if (directory / name).is_file()
        }
        config = _mapping(side_files, "tokenizer_config.json", directory)
        specials = {**_mapping(side_files, "special_tokens_map.json", directory), **config}
        backend, is_complete = _read_backend(directory)
        if not is_complete:
            specials = {**dict.fromkeys(("eos_token", "unk_token", "pad_token"), DEFAULT_SPECIAL), **specials}
        names = _special_names(specials)
        if "added_tokens_decoder" in config:
            declared = _declared(config["added_tokens_decoder"], directory)
        else:
            legacy = _mapping(side_files, "added_tokens.json", directory)
            declared = _declared_by_name(legacy, names, backend)
        _add(backend, declared, names, directory)
        pad_token = _content(specials.get("pad_token")) or (backend.padding or {}).get("pad_token") or DEFAULT_SPECIAL
        return cls(backend, pad_token, side_files)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; strings of added tokens are parsed as those tokens."""
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (UnicodeError, TypeError) as error:
            shown = ascii(text) if len(ascii(text)) < 80 else ascii(text)[:77] + "..."
            raise UserError("text", got=shown, expected="valid Unicode", do="save the prompt as UTF-8") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; invalid UTF-8 becomes U+FFFD, unknown ids are skipped."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token, None if the vocabulary lacks it."""
        return self._backend.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including added ones."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def pad_id(self) -> int:
        """The padding id."""
        pad, got = self.token_to_id(self._pad_token), f"{self._pad_token!r}, which the vocabulary lacks"
        do = "name it in tokenizer_config.json as pad_token"
        require(pad is not None, "pad token", got, "one of its tokens", do)
        return pad

    def add_tokens(self, tokens: Iterable[str], special: bool) -> None:
        """Appends tokens to the vocabulary in order, skipping existing ones."""
        entries = [tokenizers.AddedToken(token, special=special, normalized=not special) for token in tokens]
        self._backend.add_tokens(entries)
        name = "tokenizer_config.json"
        config = json.loads(self._side_files.get(name, b"{}"))
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= {
                str(self.token_to_id(entry.content)): {flag: getattr(entry, flag) for flag in TOKEN_FLAGS}
                for entry in entries
            }
            self._side_files[name] = json.dumps(config, ensure_ascii=False, indent=1).encode()

    def add_image_tokens(self, num_scales: int, num_codes: int) -> None:
        """Appends the tags of images, scale tokens and image codes, in the order of the released models."""
        self.add_tokens(["<im_start>", "<im_end>"], special=True)
        codes = [f"<S{i}>" for i in range(num_scales)] + [f"<I{i}>" for i in range(num_codes)]
        self.add_tokens(codes, special=False)

    def save(self, path: str | pathlib.Path) -> None:
        """Writes tokenizer.json and the side files to a directory, for `from_directory`."""
        directory = pathlib.Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"), pretty=False)
        for name, content in self._side_files.items():
            (directory / name).write_bytes(content)


def _read_backend(directory: pathlib.Path) -> tuple[tokenizers.Tokenizer, bool]:
    """Reads the tokenizer without the tokens of side files; returns it, and whether it came from tokenizer.json."""
    whole, vocab, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return tokenizers.Tokenizer.from_file(str(whole)), True
        if vocab.is_file() and merges.is_file():
            return _qwen(models.BPE.from_file(str(vocab), str(merges))), False
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"tokenizer in {directory}", got=error, expected="valid files", do="copy them again") from error
    present = [path.name for path in (vocab, merges) if path.is_file()]
    found = f"only {present[0]}" if present else "neither" if directory.is_dir() else "no such directory"
    raise UserError(
        "tokenizer",
        got=f"{found} in {directory}",
        expected="tokenizer.json, or vocab.json with merges.txt",
        do="pass the checkpoint's directory, or copy the tokenizer files into it",
    )


def _qwen(model: models.BPE) -> tokenizers.Tokenizer:
    """Wraps a BPE model in Qwen2's normaliser, pre-tokeniser and decoder."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _mapping(contents: Mapping[str, bytes], name: str, directory: pathlib.Path) -> dict[str, Any]:
    """Parses a side file; returns an empty dictionary if it is missing."""
    return files.parse_json(contents.get(name, b"{}"), str(directory / name))


def _content(token: Any) -> str | None:
    """Returns the string of a special token, which is stored as a string or an object."""
    content = token.get("content") if isinstance(token, dict) else token
    good = content is None or isinstance(content, str)
    require(good, "special token of the tokenizer", repr(token), "a string", "copy the tokenizer's files again")
    return content


def _special_names(specials: Mapping[str, Any]) -> list[str]:
    """Returns the special tokens named in side files, in the order in which missing ones are added."""
    extra = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = specials.get(key) or []
        value = list(value.values()) if isinstance(value, dict) else value
        require(isinstance(value, list), key, repr(value), "a list of tokens", "copy the tokenizer's files again")
        extra += value
    tokens = [_content(specials.get(key)) for key in NAMED_SPECIALS] + [_content(token) for token in extra]
    return list(dict.fromkeys(token for token in tokens if token))


def _declared(table: Mapping[str, Any], directory: pathlib.Path) -> dict[int, tokenizers.AddedToken]:
    """Converts `added_tokens_decoder` to id -> token, in the order of ids."""
    try:
        return {
            int(key): tokenizers.AddedToken(**{flag: table[key][flag] for flag in TOKEN_FLAGS if flag in table[key]})
            for key in sorted(table, key=int)
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            directory / "tokenizer_config.json",
            got=f"added_tokens_decoder with {error}",
            expected="id -> token",
            do="copy the file again",
        ) from error


def _declared_by_name(
    ids: Mapping[str, int], special_names: list[str], backend: tokenizers.Tokenizer
) -> dict[int, tokenizers.AddedToken]:
    """Converts `added_tokens.json` to id -> token, without those that the tokenizer already has."""
    good = all(type(index) is int and index >= 0 for index in ids.values())
    require(good, "added_tokens.json", "an id that is no number", "token -> id", "copy the file again")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    new = sorted((index, name, name in special_names) for name, index in ids.items() if name not in known)
    return {i: tokenizers.AddedToken(name, special=special, normalized=not special) for i, name, special in new}


def _add(
    backend: tokenizers.Tokenizer,
    declared: Mapping[int, tokenizers.AddedToken],
    special_names: list[str],
    directory: pathlib.Path,
) -> None:
    """Adds declared tokens at their ids, then undeclared special tokens, in one call."""
    if not declared and not special_names:
        return
    present = backend.get_added_tokens_decoder()
    added = [token for index, token in declared.items() if not _same(present.get(index), token)]
    known = {token.content for token in present.values()} | {token.content for token in declared.values()}
    added += [tokenizers.AddedToken(name, special=True) for name in special_names if name not in known]
    if added:  # every call rebuilds the automaton of all added tokens
        backend.add_tokens(added)
    for index, token in declared.items():
        got = backend.token_to_id(token.content)
        if got != index:
            raise UserError(
                f"tokenizer in {directory}",
                got=f"id {got} for {token.content}",
                expected=f"{index}, as declared",
                do="use the vocabulary and the added tokens of the same checkpoint",
            )


def _same(one: tokenizers.AddedToken | None, other: tokenizers.AddedToken) -> bool:
    return one is not None and all(getattr(one, flag) == getattr(other, flag) for flag in TOKEN_FLAGS)
