#!/usr/bin/env bash
# Trains on the GPUs of this machine with one process: scripts/single_gpu.sh CONFIG WORKDIR [--config.KEY=VALUE ...]
set -euo pipefail

config=${1:?configuration, configs/NAME.py:STAGE}
workdir=${2:?directory of the run}
shift 2

python - <<'PYTHON'
import jax
devices = jax.devices()
print(f"{len(devices)} x {devices[0].device_kind}")
if devices[0].platform != "gpu":
    raise SystemExit("error: jax sees no GPU - expected one - pip install 'jax[cuda13]' and check nvidia-smi")
PYTHON
# jax refuses the variable together with its old name
[[ ${XLA_PYTHON_CLIENT_MEM_FRACTION-} ]] || export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-0.92}
exec python "$(dirname "$0")/../train.py" --config="$config" --workdir="$workdir" "$@"
