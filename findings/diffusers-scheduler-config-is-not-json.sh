#!/usr/bin/env bash
# DPMSolverMultistepScheduler, the scheduler of SANA's published pipelines, saves a scheduler_config.json that is not
# JSON: `"lambda_min_clipped": -Infinity`. Python's json module reads it, readers that follow RFC 8259 refuse the whole
# file. Flow-matching Euler and UniPC save valid JSON. Saving what was loaded keeps the value.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'diffusers==0.42.1' 'orjson==3.13.0' 2>/dev/null
cat >"$folder/save.py" <<'PYTHON'
import json
import pathlib
import sys
import tempfile

import diffusers
import orjson


def saved(name):
    folder = pathlib.Path(tempfile.mkdtemp())
    scheduler = getattr(diffusers, name)()
    scheduler.save_pretrained(folder)
    scheduler.from_pretrained(folder).save_pretrained(folder)
    text = (folder / "scheduler_config.json").read_text()
    json.loads(text)
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip()
        return f"refused at {line!r}: {error}"
    return "valid"


print(f"diffusers {diffusers.__version__}, orjson {orjson.__version__}")
names = "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
seen = {name: saved(name) for name in names}
for name, result in seen.items():
    print(f"{name}: {result}")
sys.exit(["Infinity" in result for result in seen.values()] != [True, False, False])
PYTHON
"$folder/venv/bin/python" "$folder/save.py"
