"""Resolves `hf://org/name[@revision][/folder]` to a local directory with huggingface_hub, an optional dependency.

HF_HOME, HF_TOKEN and HF_HUB_OFFLINE apply as usual.
"""

import os
import pathlib
import re

from blip3o_jax.errors import UserError, require

SCHEME = "hf://"
CHECKPOINT_FILES = ("*.json", "*.safetensors", "pytorch_model*.bin", "*.txt", "*.jinja", "*.pth", "params/**",
                    "released/**")  # fmt: skip
DIFFUSION_FILES = ("transformer/*", "vae/*", "scheduler/*")
IMAGE_TOKENIZER_CONFIGS = ("siglip_config.json", "ta_tok_args.json")
IMAGE_TOKENIZER_FILES = ("ta_tok.pth", *IMAGE_TOKENIZER_CONFIGS)
REASONS = {
    "LocalEntryNotFoundError": "not in the local cache, and the hub cannot be reached",
    "RepositoryNotFoundError": "no such repository, or a private one",
    "GatedRepoError": "access has to be requested on its page",
    "RevisionNotFoundError": "no such revision",
}
"""Short messages for exceptions of the library."""


def local_path(path: str | pathlib.Path, patterns: tuple[str, ...]) -> pathlib.Path:
    """Returns a local path unchanged, and downloads the files of an `hf://` address that match the patterns.

    Raises:
      UserError: the path does not exist, the `[hub]` extra is not installed, or the download failed.
    """
    text = str(path)
    if not text.startswith(SCHEME):
        local = pathlib.Path(os.path.expanduser(text))  # an unknown user stays as written
        if text and local.exists():
            return local
        hint = f"write {SCHEME}{text} for a hub repository, or " if re.fullmatch(r"[\w.-]+/[\w.-]+", text) else ""
        what = f"{text or 'an empty path'}: does not exist"
        raise UserError(what, expected="a file or directory", do=f"{hint}correct the path")
    found = re.fullmatch(r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/]+))?(/(?P<folder>.+))?", text)
    require(found is not None, "address", text, "hf://org/name[@revision][/folder]", "correct it")
    try:
        import huggingface_hub
    except ImportError:
        what = f"{text}: huggingface_hub is not installed"
        raise UserError(what, expected="the extra", do="pip install blip3o_jax[hub]") from None
    folder = found["folder"] or ""
    wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
    try:
        snapshot = huggingface_hub.snapshot_download(found["repo"], revision=found["revision"], allow_patterns=wanted)
    except Exception as error:  # the library raises its own, httpx's and the operating system's
        reason = REASONS.get(type(error).__name__, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
        do = "check the name, the network and access rights, or unset HF_HUB_OFFLINE"
        raise UserError(f"{text}: {reason}", expected="a repository that can be fetched", do=do) from None
    return pathlib.Path(snapshot) / folder
