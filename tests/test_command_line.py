"""What the command lines of the package share: one line for a mistake, whole flags, tracebacks on demand."""

import pytest

from blip3o_jax.cli.app import parser as app_parser
from blip3o_jax.cli.convert import parser as convert_parser
from blip3o_jax.cli.evals import parser as evals_parser
from blip3o_jax.cli.flags import named_model
from blip3o_jax.cli.sample import parser as sample_parser
from blip3o_jax.command_line import Parser, seed
from blip3o_jax.demo.__main__ import _parser as world_parser


@pytest.fixture
def parser():
    top = Parser(prog="tool")
    commands = top.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make")
    make.add_argument("--guidance_scale", type=float)
    make.add_argument("--seed", type=seed)
    commands.add_parser("keep").add_argument("--folder", required=True)
    both = commands.add_parser("both")
    for name in ("--one", "--two"):
        both.add_argument(name, required=True)
    return top


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "required: command - see --help"),
        (("mak",), "invalid choice: 'mak'"),
        (("make", "--guidnce_scale", "3"), "--guidnce_scale 3 - did you mean --guidance_scale?"),
        (("make", "--scale", "3"), "--scale 3 - did you mean --guidance_scale?"),
        (("make", "--gui", "3"), "--gui 3 - did you mean --guidance_scale?"),
        (("keep", "--foldr=a"), "required: --folder - did you mean --folder?"),
        (("keep",), "required: --folder - see --help"),
        (("keep", "--folder", ""), "--folder: got '' - expected a value - see --help"),
        (("both",), "required: --one, --two - see --help"),
        (("make", "--guidance_scale", "much"), "invalid float value: 'much'"),
        (("make", "--seed", "-1"), "--seed: got -1 - expected 0 to 4,294,967,295"),
    ],
)
def test_a_mistake_behind_a_subcommand_is_one_line_with_the_nearest_flag(parser, refusal, arguments, words):
    assert words in refusal(parser.parse_args, arguments)


def test_tracebacks_may_be_asked_for_before_and_behind_a_subcommand(parser):
    assert [parser.parse_args(words).debug for words in (["make"], ["make", "--debug"], ["--debug", "make"])] == [
        False, True, True]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (evals_parser, ("geneval", "score", "folder", "--det", "verifier")),
        (evals_parser, ("demo", "--output_dir", "out", "--prompt_seed", "-1")),
        (evals_parser, ("demo", "--output_dir", "out", "--tasks", "")),
        (evals_parser, ("geneval", "score", "folder", "--output", " ")),
        (convert_parser, ("import", "a", "b", "--allow")),
        (convert_parser, ("import", "a", "b", "--diffusion", "")),
        (convert_parser, ("random", "tiny", "a", "--seed", "-1")),
        (world_parser, ("preview", "a.png", "--see", "1")),
    ],
)
def test_the_commands_of_the_package_take_whole_flags_and_sound_values_only(refusal, make, arguments):
    assert [word for word in arguments if word.startswith("--")][-1] in refusal(make().parse_args, arguments)


def test_a_flag_is_found_by_a_word_of_its_name(refusal):
    assert "did you mean --num_inference_steps?" in refusal(
        sample_parser().parse_args, ("--prompt", "x", "--steps", "3")
    )


def test_every_command_that_loads_a_model_scales_its_adapters():
    words = ["--adapter", "a", "--adapter_scale", "0.5", "--adapter", "b", "--adapter_scale", "2"]
    for parsed in (evals_parser().parse_args(["demo", "--output_dir", "out", *words]), app_parser().parse_args(words)):
        assert named_model(parsed)["adapters"] == {"a": 0.5, "b": 2.0}


@pytest.mark.parametrize("arguments", [("import", "", "b"), ("import", "a", ""), ("average", "a", "", "b")])
def test_a_place_has_a_name_but_a_prompt_may_be_empty(refusal, arguments):
    assert "got '' - expected a value" in refusal(convert_parser().parse_args, arguments)
    parsed = sample_parser().parse_args(["--prompt", "", "--negative_prompt="])
    assert (parsed.prompt, parsed.negative_prompt) == ([""], "")
