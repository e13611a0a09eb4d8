"""A browser tab without a browser: what its form asks for, what its history keeps, and its limits."""

import types

import pytest
from PIL import Image

pytest.importorskip("nicegui")

from nicegui import Client, ui

from blip3o_jax.app import page
from blip3o_jax.app.service import Ask, Choices


@pytest.fixture
def view(monkeypatch):
    """A view without widgets."""
    monkeypatch.setattr(page.View, "_refresh", lambda self: None)
    view = object.__new__(page.View)
    view._turns, view._count = [], 0
    return view


@pytest.mark.parametrize(
    "limit, most, sizes, kept",
    [("HISTORY", 100, [40, 40, 40], [2, 3]), ("HISTORY", 100, [40, 500], [2]), ("TURNS", 2, [1, 1, 1], [2, 3])],
)
def test_the_oldest_images_of_a_tab_are_dropped_but_not_the_one_that_is_shown(
    view, monkeypatch, limit, most, sizes, kept
):
    monkeypatch.setattr(page, limit, most)
    for size in sizes:
        view._add("a cat", None, Image.new("RGB", (200, 100)), bytes(size))
    assert [turn.number for turn in view._turns] == kept


def test_a_form_that_was_not_touched_asks_for_what_the_model_does_by_itself():
    service = types.SimpleNamespace(choices=Choices(((64, 64),), (8, 4), (1,)), candidates=1)
    with Client(ui.page("")):
        view = page.View(types.SimpleNamespace(service=service, model="name"), 1000)
    view._fields["prompt"].value = "a cat"
    assert view._ask() == Ask("a cat", size="64x64", num_inference_steps=8)
