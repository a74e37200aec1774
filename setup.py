"""Metadata, dependencies and package layout of massl-fast.

The folder ``kernels/`` at the top of the repository is the import package ``massl_fast.kernels``: a top-level package called
``kernels`` would clash with a distribution of that name.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LINUX = 'platform_system == "Linux"'

setup(
    name="massl-fast",
    version="0.2.1",
    description="Self-supervised pre-training of vision networks (MaSSL, CARP, DINO, iBOT, MoCo v3, MMC) at the speed of the hardware",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["massl_fast.kernels", *find_packages(include=["massl_fast", "massl_fast.*"])],
    package_dir={"massl_fast.kernels": "kernels"},
    package_data={"massl_fast": ["py.typed", "recipes/*.yaml", "recipes/plans/*.yaml", "report/templates/*", "benchmarks/*.ini"]},
    install_requires=[
        "torch>=2.9",
        "torchvision>=0.24",
        # Older ones load a local folder with torch.load, and stumble over a second safetensors file.
        "timm>=1.0.26",
        f"triton>=3.5; {LINUX}",
        "numpy>=1.26",
        "pillow>=10.3",
        "safetensors>=0.4.5",
        "pydantic>=2.8",
        "pyyaml>=6.0",
        "rich>=13.7",
        "jinja2>=3.1",
        # Scripts for the completion of shells.
        "shtab>=1.8",
        # Intervals of benchmark figures; processes of loaders.
        "scipy>=1.11",
        "psutil>=5.9",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "codespell>=2.4",
            "mkdocs-material>=9.5",
            "mypy>=1.18",
            "setuptools>=77",
            "pyarrow>=15",
        ],
        # DALI is published per CUDA major version; the torch that the index serves today is built for CUDA 13.
        "dali-cuda12": [f"nvidia-dali-cuda120>=1.52; {LINUX}"],
        "dali-cuda13": [f"nvidia-dali-cuda130>=1.52; {LINUX}"],
        # Parquet files with images, as Hugging Face's datasets writes them.
        "parquet": ["pyarrow>=15"],
        "report": ["matplotlib>=3.8"],
        "docs": ["mkdocs-material>=9.5"],
        "tensorboard": ["tensorboard>=2.17"],
        "wandb": ["wandb>=0.17"],
        # bench/learning.py: the outside library's DINO.
        "learning": ["lightly>=1.6", "matplotlib>=3.8"],
        "eval": ["scikit-learn>=1.4", "scipy>=1.11", "pycocotools>=2.0.7"],
    },
    entry_points={"console_scripts": ["massl-fast = massl_fast.cli:main"]},
)
