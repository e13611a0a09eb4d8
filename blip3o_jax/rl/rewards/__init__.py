"""Rewards of images, given prompt, references and metadata; see `types.Reward`."""

REWARDS = {
    "geneval": "blip3o_jax.rl.rewards.composition:GenEval",
    "geneval_strict": "blip3o_jax.rl.rewards.composition:GenEvalStrict",
    "geneval_official": "blip3o_jax.rl.rewards.composition:GenEvalOfficial",
    "text": "blip3o_jax.rl.rewards.text:Text",
    "text_exact": "blip3o_jax.rl.rewards.text:TextExact",
    "edit": "blip3o_jax.rl.rewards.editing:Edit",
    "edit_graded": "blip3o_jax.demo.rewards:EditGraded",
    "edit_kept": "blip3o_jax.rl.rewards.editing:EditKept",
    "edit_psnr": "blip3o_jax.rl.rewards.editing:EditPsnr",
    "edit_ssim": "blip3o_jax.rl.rewards.editing:EditSsim",
    "remote": "blip3o_jax.rl.rewards.remote:Remote",
    "redness": "blip3o_jax.rl.rewards.sanity:redness",
    "brightness": "blip3o_jax.rl.rewards.sanity:brightness",
}
"""Name -> reward, as `module:attribute`; configurations may also give a `package.module:attribute` of their own."""
