#!/usr/bin/env bash
# jax 0.10.2 on CPU: XLA_FLAGS=--xla_cpu_multi_thread_eigen=false, which benchmarks and job scripts use for one thread per
# process, is accepted and has no effect. Matrix products and convolutions take all cores whatever it says, without a warning,
# so that as many processes as cores compete for them, and times "on one thread" are times on all. PJRT_NPROC=1 does limit them.
# The same with jax 0.12.0.1.
# Measured as processor time over wall time, the largest of five runs; needs two cores. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/threads.py" <<'PYTHON'
import sys
import time

import jax
import jax.numpy as jnp

kind = sys.argv[1]
if kind == "product":
    x, kernel = jnp.ones((64, 1024)), jnp.full((1024, 1024), 1e-3)
    apply = jnp.matmul
else:
    x, kernel = jnp.ones((4, 128, 128, 64)), jnp.full((3, 3, 64, 64), 1e-3)

    def apply(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.jit
def run(x, kernel):
    return jax.lax.fori_loop(0, 200 if kind == "product" else 2, lambda _, x: apply(x, kernel), x)


run(x, kernel).block_until_ready()
ratios = []
for _ in range(5):
    wall, processor = time.perf_counter(), time.process_time()
    run(x, kernel).block_until_ready()
    ratios.append((time.process_time() - processor) / (time.perf_counter() - wall))
print(f"{max(ratios):.2f}")
PYTHON
threads() { env "$1" JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/threads.py" "$2"; }
off=XLA_FLAGS=--xla_cpu_multi_thread_eigen=false
declare -A found
for kind in product convolution; do
    found[$kind]=$(threads "$off" $kind)
    found[$kind-limited]=$(threads PJRT_NPROC=1 $kind)
    found[$kind-free]=$(threads XLA_FLAGS= $kind)
done
"$folder/venv/bin/python" -c 'import jax, jaxlib; print("jax", jax.__version__, "jaxlib", jaxlib.__version__)'
echo "processor time / wall time, $(nproc) cores"
for kind in product convolution; do
    echo "$kind: ${found[$kind-free]}; with --xla_cpu_multi_thread_eigen=false ${found[$kind]}; with PJRT_NPROC=1 ${found[$kind-limited]}"
done
"$folder/venv/bin/python" - "${found[product]}" "${found[convolution]}" \
    "${found[product-limited]}" "${found[convolution-limited]}" <<'PYTHON'
import sys

*free, product, convolution = map(float, sys.argv[1:])
assert min(free) > 1.4, "the flag limits threads"
assert max(product, convolution) < 1.2, "PJRT_NPROC does not"
print("seen: the flag for one thread has no effect")
PYTHON
