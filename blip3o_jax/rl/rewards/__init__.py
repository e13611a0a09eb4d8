"""Rewards: what a picture is worth for its prompt.

A reward is a function `(prompts, images, metadata, **options) -> float32[N]` of N prompts, pictures uint8[N Y X 3] and
descriptions; see `types.Reward`. To add one: a function in a file of this package and a row of the table, or
`package.module:function` in a configuration, without touching this package. A function may have a companion in CHECKS
that refuses prompts which it cannot judge, before anything is sampled.
"""

from blip3o_jax.rl.rewards import composition, editing, remote, sanity, text

REWARDS = {
    "geneval": composition.geneval,
    "geneval_strict": composition.geneval_strict,
    "geneval_official": composition.geneval_official,
    "text": text.text,
    "text_exact": text.text_exact,
    "edit": editing.edit,
    "edit_graded": editing.edit_graded,
    "edit_kept": editing.edit_kept,
    "edit_psnr": editing.edit_psnr,
    "remote": remote.remote,
    "redness": sanity.redness,
    "brightness": sanity.brightness,
}
"""Name -> reward."""

CHECKS = {
    "geneval": composition.check,
    "geneval_strict": composition.check,
    "geneval_official": composition.check,
    "text": text.check,
    "text_exact": text.check,
    "edit": editing.check,
    "edit_graded": editing.check,
    "edit_kept": editing.check,
    "edit_psnr": editing.check,
}
"""Name -> function of (prompts, metadata) that raises UserError for what the reward cannot judge."""
