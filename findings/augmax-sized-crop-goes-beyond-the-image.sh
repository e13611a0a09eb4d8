#!/usr/bin/env bash
# Augmax, RandomSizedCrop with prevent_underzoom=True, the default: half of the crops reach beyond the image and have black borders.
# Of crops of 64 x 64 from an image of 64 x 64 51 % do, with up to three quarters of black, 24 % of all pixels. It is the same with
# prevent_underzoom=False; the option has no effect unless the crop is 1.65 times as large as the image or more, and none that
# would be enough then.
# The smallest zoom is taken as the largest of zoom_range[0] and the logarithm of crop / image, which is below 0 where the crop is
# smaller. The zoom itself, not its logarithm, is what is drawn between these.
# The documentation: "prevent_underzoom: whether to prevent zooming beyond the image size". A reader expects crops that lie within
# the image, as torchvision's RandomResizedCrop has them, and gets them only with zoom_range that begins at crop / image.
# A generator learns the borders; a network for perception sees objects of half the size in black. Keypoints and masks follow the
# image, and most crops look right.
# Right is zoom_range=(max(height / H, width / W), ...). Here with augmax 0.4.1. Exits 0 while that is so.
# Matters to: whoever augments images on the device, for generators as for perception.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'augmax==0.4.1' 2>/dev/null
cat >"$folder/crop.py" <<'PYTHON'
import importlib.metadata
import sys

import augmax
import jax
import jax.numpy as jnp
import numpy as np

print("augmax", importlib.metadata.version("augmax"), "jax", jax.__version__)
IMAGES = 1000
keys = jax.random.split(jax.random.key(0), IMAGES)


def black(side, crop, **options):
    """The share of crops of a white image that have black pixels, of black pixels in all and in the worst crop."""
    image, chain = jnp.ones((side, side, 1)), augmax.Chain(augmax.RandomSizedCrop(crop, crop, **options))
    crops = np.asarray(jax.jit(jax.vmap(lambda key: chain(key, image)))(keys))
    share = (crops < 0.5).mean((1, 2, 3))
    return (share > 0).mean(), share.mean(), share.max()


ok = []
for side, crop in ((64, 64), (80, 64), (128, 64), (32, 64)):
    rows = {
        "prevent_underzoom=True": black(side, crop, prevent_underzoom=True),
        "prevent_underzoom=False": black(side, crop, prevent_underzoom=False),
        f"zoom_range=({crop / side}, {max(2.0, crop / side)})": black(side, crop, zoom_range=(crop / side, max(2.0, crop / side))),
    }
    print(f"crops of {crop} from images of {side}")
    for name, (crops, pixels, worst) in rows.items():
        print(f"  {name:<25} {crops:4.0%} of the crops, {pixels:4.0%} of the pixels, {worst:4.0%} of the worst crop are black")
    with_option, without, right = rows.values()
    ok += [right[1] == 0, with_option == without or side < crop]
    ok += [with_option[0] > 0.3 if side < 2 * crop else with_option[0] == 0]
sys.exit(0 if all(ok) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/crop.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
