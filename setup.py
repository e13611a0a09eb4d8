"""Packaging of blip3o_jax."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "blip3o_jax" / "version.py").read_text().splitlines()
    if line.startswith("__version__")
)

SCRIPTS = {
    "app": "app", "sample": "sample", "train": "train", "convert": "convert", "data": "data", "plan": "plan",
    "eval": "evals",
}  # fmt: skip

setup(
    name="blip3o_jax",
    version=VERSION,
    description="BLIP3o-NEXT in JAX: one model that generates and edits images, on CPU, GPU and TPU",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[*find_packages(include=["blip3o_jax", "blip3o_jax.*"]), "blip3o_jax.configs"],
    package_dir={"blip3o_jax.configs": "configs"},  # `--config=tiny:pretrain` works outside a checkout
    package_data={"": ["py.typed", "assets/**/*"]},
    entry_points={
        "console_scripts": [f"blip3o-{name}=blip3o_jax.cli.{module}:main" for name, module in SCRIPTS.items()]
    },
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "einops>=0.8",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pillow>=11",
        "scipy>=1.14",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": ["pytest>=9", "pytest-xdist>=3.6", "ruff>=0.8", "safetensors>=0.5"],
        "app": ["nicegui>=3.18", "prometheus-client>=0.22", "python-multipart>=0.0.31"],
        "parity": ["torch>=2.7", "transformers>=4.52", "diffusers>=0.35", "peft>=0.21"],
        "detector": ["torch>=2.7", "transformers>=4.52"],
        "ocr": ["onnxruntime>=1.20", "rapidocr>=3.10"],
        "plan-gpu": ["jax[cuda12-local]", "nvidia-cuda-nvcc-cu12"],  # the compilers of the installed jax
        "plan-tpu": ["jax[tpu]"],
        "hub": ["huggingface_hub>=0.30"],
        "wandb": ["wandb>=0.19"],
    },
)
