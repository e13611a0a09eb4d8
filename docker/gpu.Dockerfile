# CPU or NVIDIA GPU: docker build -f docker/gpu.Dockerfile [--build-arg JAX_EXTRA=cuda13] -t blip3o_jax .
#   docker run --rm -v $PWD/runs:/runs blip3o_jax python train.py --config=configs/tiny.py --workdir=/runs/tiny
#   docker run --rm --gpus all --shm-size=8g ...                                  with the GPU build
FROM python:3.12-slim

# empty: CPU; cuda13: CUDA comes with jax' wheels, the host brings the driver
ARG JAX_EXTRA=

WORKDIR /opt/blip3o_jax
COPY setup.py pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY blip3o_jax blip3o_jax
COPY configs configs
RUN pip install --no-cache-dir -e . -c constraints/py312.txt \
    && if [ -n "$JAX_EXTRA" ]; then pip install --no-cache-dir "jax[$JAX_EXTRA]" -c constraints/py312.txt; fi
COPY train.py sample.py ./

ENV PYTHONUNBUFFERED=1
CMD ["python", "train.py", "--help"]
