"""PNGs that can be fetched for a while under unguessable names."""

import collections
import hashlib
import hmac
import secrets

ROOM = 2**28  # bytes


class Shelf:
    """Store of PNGs that evicts the oldest ones."""

    def __init__(self, room: int = ROOM):
        self._room, self._secret = room, secrets.token_bytes()
        self._kept: collections.OrderedDict[str, bytes] = collections.OrderedDict()

    def put(self, png: bytes) -> str:
        """Store a PNG and return its name, which depends on its bytes alone."""
        name = hmac.new(self._secret, png, hashlib.sha256).hexdigest()[:32]
        self._kept[name] = png
        self._kept.move_to_end(name)
        while sum(map(len, self._kept.values())) > self._room and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        """Return the PNG of a name, or None if it was evicted."""
        return self._kept.get(name)
