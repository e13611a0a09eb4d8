"""Another detector for GenEval's rules: it finds large areas of one colour, and calls them flags.

    python -m blip3o_jax.evals geneval score FOLDER --detector examples.detector:Flags
    --config.rl.rewards="({'name': 'geneval', 'options': {'detector': 'examples.detector:Flags'}, 'weight': 1.0},)"

A detector says what it knows, so that prompts with anything else are refused and not scored 0. One with networks takes
`(model=None, clip=None)` and reads them in `load`, which returns a line for the report.
"""

import numpy as np

from blip3o_jax.detection import Detection, Thresholds, Vocabulary

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 200)}


class Flags:
    """Finds at most one flag of every colour."""

    vocabulary = Vocabulary(classes={"flag": len(COLORS)}, colors=tuple(COLORS))
    thresholds = Thresholds(counting=0.05, others=0.05)  # of the score: the share of the image that a flag covers

    def __call__(self, image: np.ndarray) -> list[Detection]:
        """uint8[Y X 3] -> the flags, the largest first."""
        found = [self._flag(image, name, color) for name, color in COLORS.items()]
        return sorted(filter(None, found), key=lambda flag: -flag.score)

    def _flag(self, image: np.ndarray, name: str, color: tuple[int, int, int]) -> Detection | None:
        near = np.abs(image.astype(int) - color).max(axis=-1) < 60
        if not near.any():
            return None
        rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
        box = float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
        return Detection("flag", name, box, float(near.mean()))
