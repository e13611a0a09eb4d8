#!/usr/bin/env bash
# Compiling ahead of time (jax.experimental.topologies) takes whatever compiler is installed. jax compares its version with
# that of jax-cuda12-plugin; the compiler is in jax-cuda12-pjrt. With jax 0.10.2 and
# - an older jax-cuda12-pjrt beside the right jax-cuda12-plugin, nothing is said,
# - both of them older, a warning says that the plugin "will not be used", and it is used,
# - an older libtpu than jax[tpu] asks for, nothing is said.
# All of them compile, and memory_analysis() then describes another compiler's program: compare the versions of the packages.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
install() { "$folder/venv/bin/pip" install --quiet --no-deps --target "$folder/$1" "${@:2}" 2>/dev/null; }
install plugin-new 'jax-cuda12-plugin==0.10.2'
install plugin-old 'jax-cuda12-plugin==0.10.1'
install pjrt-old 'jax-cuda12-pjrt==0.10.1'
install tpu-old 'libtpu==0.0.40'
cat >"$folder/compile.py" <<'PYTHON'
import importlib.metadata
import os
import sys
import warnings

os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
GPU = """gpu_device_info { cuda_compute_capability { major: 9 minor: 0 }
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 memory_bandwidth: 3352000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85899345920 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }"""

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    if sys.argv[1] == "tpu":
        topology = topologies.get_topology_desc("v5e:2x2", "tpu")
    else:
        topology = topologies.get_topology_desc("h100", "cuda", target_config=GPU, topology="1x1x1")
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=SingleDeviceSharding(topology.devices[0]))
    peak = jax.jit(jnp.tanh).lower(x).compile().memory_analysis().peak_memory_in_bytes
said = " ".join({str(each.message) for each in caught if "version" in str(each.message)})
names = ["libtpu"] if sys.argv[1] == "tpu" else ["jax-cuda12-plugin", "jax-cuda12-pjrt"]
versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
print(f"jax {jax.__version__} with {versions}: compiled, peak {peak:,} bytes; warning: {said or 'none'}")
sys.exit(0 if peak > 0 and ("will not be used" in said if sys.argv[2] == "warns" else not said) else 1)
PYTHON
run() {
    PYTHONPATH="$1" "$folder/venv/bin/python" "$folder/compile.py" "$2" "$3" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
}
run "$folder/plugin-new:$folder/pjrt-old" cuda silent
run "$folder/plugin-old:$folder/pjrt-old" cuda warns
run "$folder/tpu-old" tpu silent
