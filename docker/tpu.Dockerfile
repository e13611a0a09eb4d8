# Cloud TPU, for GKE and xpk: docker build -f docker/tpu.Dockerfile -t REGISTRY/blip3o_jax:tpu . && docker push ...
FROM python:3.12-slim

WORKDIR /opt/blip3o_jax
COPY setup.py pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY blip3o_jax blip3o_jax
COPY configs configs
RUN pip install --no-cache-dir -e . 'jax[tpu]' -c constraints/py312.txt
COPY train.py sample.py ./

ENV PYTHONUNBUFFERED=1
CMD ["python", "train.py", "--help"]
