"""A data format from outside the package, named in a configuration, read by the check and trained on."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

from support.data_makers import picture

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from configs import tiny

def get_config():
    config = tiny.get_config("vae")
    config.data.update({"sources": ({"kind": "data_format:ZipImages", "path": "$PHOTOS"},), "batch_size": 2})
    config.loop.num_steps = 1
    return config
"""


def run(directory, *command):
    """Output of a command that has to work, in a directory that holds the format, not the package."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PHOTOS": "photos.zip", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *command], cwd=directory, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_a_format_from_outside_is_checked_and_trained_on(tmp_path):
    shutil.copy(ROOT / "examples" / "data_format.py", tmp_path)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number in range(4):
            archive.writestr(f"{number}.png", picture(number, (40, 40)))
        archive.writestr("captions.csv", 'file,caption\n0.png,"a, red"\n1.png,two\n2.png,\n9.png,none\n')
    (tmp_path / "config.py").write_text(CONFIG)
    source = {"kind": "data_format:ZipImages", "path": "$PHOTOS"}
    check = {"sources": [source], "batch_size": 2, "max_broken_share": 1.0}
    (tmp_path / "check.json").write_text(json.dumps(check))
    told = run(tmp_path, "-m", "blip3o_jax.data", "check", "check.json", "--image_size", "8", "--tokenizer_size", "8")
    assert "2 from caption: 'a, red', 'two'; fields there: file, caption" in told
    assert "1 skipped: image without a row (3.png)" in told
    assert "captions.csv:4: no caption: looked for caption; the item has file, caption (empty)" in told
    assert "captions.csv:5: \"There is no item named '9.png' in the archive\"" in told
    run(tmp_path, str(ROOT / "train.py"), "--config=config.py", "--workdir=run")
    assert (tmp_path / "run" / "model").is_dir()
