"""Models out of parts: a recorded checkpoint taken apart and put together again, and the rows that are new."""

import json
import shutil

import numpy as np
import pytest
import tokenizers

from blip3o_jax.cli.convert import main
from blip3o_jax.config import EditConfig, TokenIds
from blip3o_jax.convert import embedding_rows, safetensors_io, weight_files
from blip3o_jax.convert.assemble import _write_tokenizer
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.convert.embedding_rows import effective_codebook, extend_table, project_codebook
from blip3o_jax.convert.sources import in_memory
from blip3o_jax.convert.tables import AUTOENCODER_PREFIX, DIT_PREFIX, IMAGE_TOKENIZER_PREFIX
from blip3o_jax.errors import UserError
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.treepath import flatten

TEXT_ROWS, PADDED_ROWS = 320, 330  # of the vocabulary before anything is added, and of its embedding table
IDS = TokenIds(6, 7, 8, 3, 11, 5, pad=0)


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def pieces(golden_root, tmp_path_factory):
    """Flags that name the parts of the recorded text-to-image checkpoint, and that checkpoint's directory."""
    torch = pytest.importorskip("torch", reason="writes ta_tok.pth")
    source = golden_root / "t2i" / "checkpoint"
    root = tmp_path_factory.mktemp("pieces")
    weights = weight_files.open_weights(source)
    tensors = {key: np.array(tensor.read()) for key, tensor in weights.items()}

    def part(prefix):
        return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}

    def write(directory, values, name):
        safetensors_io.write_weights(directory, in_memory(values), name)

    for name, prefix in (("transformer", DIT_PREFIX), ("vae", AUTOENCODER_PREFIX)):
        shutil.copytree(source / "diffusion" / name, root / "sana" / name)
        write(root / "sana" / name, part(prefix), "diffusion_pytorch_model")
    shutil.copytree(source / "diffusion" / "scheduler", root / "sana" / "scheduler")
    shutil.copyfile(source / "siglip_config.json", root / "siglip_config.json")
    state = {key: torch.tensor(value.astype(np.float32)) for key, value in part(IMAGE_TOKENIZER_PREFIX).items()}
    args = read_json(source / "ta_tok_args.json")
    torch.save({"model": {"args": args, "sd": state}}, root / "ta_tok.pth")
    write_decoder(source, root / "qwen", tensors, write)
    flags = {"--decoder": root / "qwen", "--diffusion": root / "sana", "--image_tokenizer": root / "ta_tok.pth"}
    return flags, source


def write_decoder(source, directory, tensors, write):
    """A Qwen3 without image tokens, whose table has a few padding rows."""
    directory.mkdir()
    text = ("model.layers.", "model.norm.")
    values = {key: value for key, value in tensors.items() if key.startswith(text)}
    values["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:PADDED_ROWS]
    write(directory, values, "model")
    config = {**read_json(source / "config.json"), "model_type": "qwen3", "vocab_size": PADDED_ROWS}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = read_json(source / "tokenizer.json")
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < TEXT_ROWS]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    declared = read_json(source / "tokenizer_config.json")
    table = declared["added_tokens_decoder"]
    declared["added_tokens_decoder"] = {key: value for key, value in table.items() if int(key) < TEXT_ROWS}
    declared.pop("additional_special_tokens", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(declared))


def arguments(pieces, target, *more):
    return ["assemble", *(str(word) for pair in pieces.items() for word in pair), *more, str(target)]


def assemble(pieces, target, *more):
    main(arguments(pieces, target, *more))
    return open_checkpoint(target)


@pytest.fixture(scope="module")
def assembled(pieces, tmp_path_factory):
    return assemble(pieces[0], tmp_path_factory.mktemp("assembled") / "model")


def test_what_is_put_together_equals_what_was_taken_apart(pieces, assembled):
    recorded = open_checkpoint(pieces[1])
    assert assembled.config == recorded.config
    got, expected = (flatten(checkpoint.load_params()) for checkpoint in (assembled, recorded))
    assert set(got) == set(expected)
    for path, value in expected.items():
        if path == "decoder/embed/table":
            np.testing.assert_array_equal(got[path][:322], value[:322])  # tags have padding rows of their own
        elif not path.startswith("connector/"):
            np.testing.assert_array_equal(got[path].astype(np.float32), value.astype(np.float32), err_msg=path)
    assert got["connector/hidden/kernel"].std() > 0
    np.testing.assert_allclose(got["connector/norm/scale"], 5.5**0.5, rtol=1e-6)


def test_the_effective_codebook_has_unit_rows_of_the_projected_embedding():
    generator = np.random.default_rng(0)
    table, kernel, bias = (generator.standard_normal(shape) for shape in ((5, 3), (3, 3), (3,)))
    moved = [kernel @ row + bias for row in table]  # as torch's Linear computes it
    expected = [row / np.linalg.norm(row) for row in moved]
    np.testing.assert_allclose(effective_codebook(table, kernel, bias), expected, rtol=1e-5)


def test_a_head_that_is_not_tied_gets_rows_of_its_own(pieces, assembled, tmp_path):
    flags, _ = pieces
    decoder = shutil.copytree(flags["--decoder"], tmp_path / "qwen")
    values = {key: np.array(tensor.read()) for key, tensor in weight_files.open_weights(decoder).items()}
    values["lm_head.weight"] = -values["model.embed_tokens.weight"]
    safetensors_io.write_weights(decoder, in_memory(values), "model")
    config = read_json(decoder / "config.json")
    (decoder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    other = assemble({**flags, "--decoder": decoder}, tmp_path / "model", "--seed", "1")
    first, second = (each.load_params(parts=["connector"])["connector"] for each in (assembled, other))
    assert np.abs(first["hidden"]["kernel"] - second["hidden"]["kernel"]).max() > 0, "drawn by the seed"
    got = other.load_params(parts=["decoder"])["decoder"]
    assert not other.config.decoder.tie_embeddings
    assert got["lm_head"]["table"].shape == got["embed"]["table"].shape == (389, 64)
    np.testing.assert_array_equal(got["lm_head"]["table"][:322], -got["embed"]["table"][:322])


def test_arguments_beside_an_image_tokenizer_in_safetensors_count(pieces, tmp_path):
    flags, source = pieces
    tensors = weight_files.open_weights(source)
    prefix = IMAGE_TOKENIZER_PREFIX
    own = {key.removeprefix(prefix): np.array(x.read()) for key, x in tensors.items() if key.startswith(prefix)}
    safetensors_io.write_weights(tmp_path, in_memory(own), "ta_tok")
    shutil.copyfile(source / "siglip_config.json", tmp_path / "siglip_config.json")
    args = read_json(source / "ta_tok_args.json")
    args["bottleneck"]["args"]["regularizer"]["args"]["stochastic_temperature"] = 0.5
    (tmp_path / "ta_tok_args.json").write_text(json.dumps(args))
    assembled = assemble({**flags, "--image_tokenizer": tmp_path / "ta_tok.safetensors"}, tmp_path / "model")
    assert assembled.config.image_tokenizer.temperature == 0.5


def test_the_codes_start_at_the_mean_of_the_rows_before(assembled):
    table = np.asarray(assembled.load_params(parts=["decoder"])["decoder"]["embed"]["table"]).astype(np.float32)
    mean = table[:325].mean(axis=0)
    np.testing.assert_allclose(table[325:], np.broadcast_to(mean, (64, 64)), atol=1e-3)
    np.testing.assert_allclose(table[322:325], np.broadcast_to(table[:322].mean(axis=0), (3, 64)), atol=1e-3)


def test_the_tokenizer_gains_the_tokens_of_the_released_models(pieces, assembled):
    got, expected = (Tokenizer.from_directory(path) for path in (assembled.tokenizer_dir, pieces[1]))
    text = "a cat <im_start><S0><S2><I0><I63><im_end><|im_end|>\n"
    assert got.encode(text) == expected.encode(text)
    assert got.vocab_size == expected.vocab_size and got.pad_id == expected.pad_id


def test_a_part_too_few_or_from_another_model_is_told(pieces, tmp_path, refusal):
    flags = dict(pieces[0])
    assert "no config.json" in refusal(main, arguments({**flags, "--diffusion": tmp_path}, tmp_path / "a"))
    made = {**flags, "--decoder": pieces[1]}  # has image tokens already
    assert "expected a Qwen3 model" in refusal(main, arguments(made, tmp_path / "b"))
    assert "--preset: the parts differ" in refusal(main, arguments(flags, tmp_path / "c", "--preset", "mid"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scaling", [{"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 2.0}])
def test_a_decoder_with_scaled_positions_is_refused(pieces, tmp_path, refusal, scaling):
    decoder = shutil.copytree(pieces[0]["--decoder"], tmp_path / "qwen")
    config = read_json(decoder / "config.json")
    (decoder / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    error = refusal(main, arguments({**pieces[0], "--decoder": decoder}, tmp_path / "model"))
    assert "config.json: rope_scaling." in error


def test_parts_are_not_read_for_a_place_that_cannot_be_written(pieces, tmp_path, refusal):
    (tmp_path / "model" / "something").mkdir(parents=True)
    wanted = {**pieces[0], "--decoder": tmp_path / "none"}
    assert "model: exists already" in refusal(main, arguments(wanted, tmp_path / "model"))


def test_an_editing_preset_adds_its_connector_and_the_codebook_can_be_projected(pieces, tmp_path, capsys):
    config = open_checkpoint(pieces[1]).config
    made = assemble(pieces[0], tmp_path / "model", "--preset", "tiny-edit", "--project_codebook")
    assert made.config.edit == EditConfig(vae_condition=True, vae_noise=True) and made.config.tokens == config.tokens
    params = made.load_params(parts=["vae_connector", "decoder"])
    table = np.asarray(params["decoder"]["embed"]["table"]).astype(np.float32)
    assert np.unique(table[325:].round(4), axis=0).shape[0] == 64
    out = capsys.readouterr().out
    assert "every leaf filled once" in out and "vae_connector" in out and "projected" in out
    main(["export", str(tmp_path / "model"), str(tmp_path / "released")])
    assert open_checkpoint(tmp_path / "released").config == made.config


def test_rows_that_a_table_lacks_are_drawn_with_the_shrunk_covariance(monkeypatch):
    monkeypatch.setattr(embedding_rows, "VARIANCE", 0.25)
    generator = np.random.default_rng(0)
    table = (generator.standard_normal((6, 3)) * [1, 10, 0]).astype(np.float32)
    ids = TokenIds(6, 7, 8, 20_000, 20_008, 5, pad=0)
    rows = extend_table(table, ids, generator)[6:20_008]
    np.testing.assert_allclose(rows.mean(axis=0), table.mean(axis=0), atol=0.1)
    np.testing.assert_allclose(rows.std(axis=0), 0.5 * table.std(axis=0), rtol=0.03, atol=1e-6)


def test_rows_behind_the_tags_give_way():
    table = np.arange(40, dtype=np.float32).reshape(20, 2)
    out = extend_table(table, IDS, np.random.default_rng(0))
    assert out.shape == (16, 2)
    np.testing.assert_array_equal(out[:8], table[:8])
    np.testing.assert_allclose(out[8:11], np.broadcast_to(table[:8].mean(axis=0), (3, 2)), rtol=1e-3)
    np.testing.assert_allclose(out[11:], np.broadcast_to(out[:11].mean(axis=0), (5, 2)), rtol=1e-6)


@pytest.mark.parametrize("width", [8, 16])
def test_a_projected_codebook_keeps_its_angles(width):
    generator = np.random.default_rng(0)
    codebook = generator.standard_normal((32, 8)).astype(np.float32)
    moved = project_codebook(codebook, width, 3.0, generator)
    centred = codebook - codebook.mean(axis=0)
    cosines = [(x @ x.T) / np.outer(*(np.linalg.norm(x, axis=1),) * 2) for x in (moved, centred)]
    np.testing.assert_allclose(*cosines, atol=1e-5)
    assert np.sqrt(np.square(moved).sum(axis=1).mean()) == pytest.approx(3.0)


def test_a_narrower_table_takes_a_projection_of_the_codebook():
    codebook = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    assert project_codebook(codebook, 4, 1.0, np.random.default_rng(1)).shape == (32, 4)


@pytest.mark.parametrize(("tag", "words"), [("<im_start>", "got <im_start> - expected a raw"), ("<im_end>", "ids of")])
def test_a_tokenizer_that_has_a_tag_of_images_already_is_refused(tmp_path, tag, words):
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()), "<|endoftext|>")
    tokenizer.add_tokens(["<|endoftext|>", tag], special=True)
    tokenizer.save(tmp_path / "qwen")
    with pytest.raises(UserError, match=words):
        _write_tokenizer(tmp_path / "qwen", tmp_path / "made", 4)
    assert not (tmp_path / "made").exists()
