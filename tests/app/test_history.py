"""The history of a browser tab: what it keeps, and its limits."""

import pytest
from PIL import Image

pytest.importorskip("nicegui")

from blip3o_jax.app import page


@pytest.fixture
def view(monkeypatch):
    """A view without widgets."""
    monkeypatch.setattr(page.View, "_refresh", lambda self: None)
    view = object.__new__(page.View)
    view._turns, view._count = [], 0
    return view


def numbers(view, sizes):
    for size in sizes:
        view._add("a cat", None, Image.new("RGB", (200, 100)), bytes(size))
    return [turn.number for turn in view._turns]


def test_the_oldest_images_are_dropped_beyond_the_bytes_of_a_tab(view, monkeypatch):
    monkeypatch.setattr(page, "HISTORY", 100)
    assert numbers(view, [40, 40, 40]) == [2, 3]
    assert numbers(view, [500]) == [4], "the image that is shown stays"


def test_the_oldest_images_are_dropped_beyond_their_number(view, monkeypatch):
    monkeypatch.setattr(page, "TURNS", 2)
    assert numbers(view, [1, 1, 1]) == [2, 3]
