"""PNGs that have an address for a while, which nobody can guess."""

import collections
import hashlib
import hmac
import secrets

ROOM = 2**28  # bytes


class Shelf:
    """Keeps PNGs until newer ones need their room."""

    def __init__(self, room: int = ROOM):
        self._room, self._secret = room, secrets.token_bytes()
        self._kept: collections.OrderedDict[str, bytes] = collections.OrderedDict()

    def put(self, png: bytes) -> str:
        """The name of a PNG: the same one for the same bytes."""
        name = hmac.new(self._secret, png, hashlib.sha256).hexdigest()[:32]
        self._kept[name] = png
        self._kept.move_to_end(name)
        while sum(map(len, self._kept.values())) > self._room and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        """The PNG of a name; None where there is none any more."""
        return self._kept.get(name)
