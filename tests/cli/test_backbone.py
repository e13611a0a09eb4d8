"""`--backbone` names the backbone of the checkpoint, or is refused."""

import pytest

from blip3o_jax import Pipeline, experiment
from blip3o_jax.cli import convert, evals, sample
from blip3o_jax.convert.checkpoint import import_checkpoint, open_checkpoint
from blip3o_jax.errors import UserError
from configs import tiny

NATIVE, RELEASED = "{folder}/native", "{golden}/t2i/checkpoint"


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (sample.main, ["--prompt", "a", "--checkpoint", RELEASED, "--output_dir", "{folder}/out"]),
        (evals.main, ["demo", "--checkpoint", RELEASED, "--output_dir", "{folder}/out"]),
        (convert.main, ["export", NATIVE, "{folder}/out"]),
        (convert.main, ["average", NATIVE, RELEASED, "{folder}/out"]),
    ],
)
def test_another_backbone_than_the_checkpoint_has_is_refused(main, words, golden_root, tmp_path, refusal):
    import_checkpoint(open_checkpoint(golden_root / "t2i" / "checkpoint"), tmp_path / "native")
    words = [*(word.format(folder=tmp_path, golden=golden_root) for word in words), "--backbone=os:path"]
    assert "backbone: got os:path - expected sana, the backbone of" in refusal(main, words)
    assert not (tmp_path / "out").exists()


def test_the_pipeline_and_a_training_configuration_refuse_it_too(golden_root):
    with pytest.raises(UserError, match="backbone: got os:path - expected sana"):
        Pipeline.from_pretrained(golden_root / "t2i" / "checkpoint", backbone="os:path")
    assert Pipeline.from_pretrained(golden_root / "t2i" / "checkpoint", backbone="sana").config.dit.name == "sana"
    settings = tiny.get_config("pretrain").to_dict() | {"model": None, "backbone": "os:path", "tokenizer": None}
    settings |= {"init_from": str(golden_root / "t2i" / "checkpoint")}
    with pytest.raises(UserError, match="backbone: got os:path - expected sana"):
        experiment.open_start(experiment.from_settings(settings))
