"""Command line of the server: what needs no server."""

import pytest

from blip3o_jax.cli.app import parser, served_name


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "embedded"),
        ("--checkpoint hf://org/name", "name"),
        ("--checkpoint runs/mine/model/", "model"),
        ("--checkpoint .", "here"),
        ("--adapter runs/paint --adapter hf://org/signs", "embedded+paint+signs"),
        ("--adapter runs/paint --served_model_name gpt-image-1", "gpt-image-1"),
    ],
)
def test_clients_know_the_model_by_its_directories_or_by_the_name_given(tmp_path, monkeypatch, flags, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert served_name(parser().parse_args(flags.split())) == name
