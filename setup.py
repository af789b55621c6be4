"""Packaging. `configs/` lies beside the package in a clone and ships inside it in the wheel."""

from pathlib import Path

from setuptools import find_packages, setup

extras = {
    "tensorboard": ["tensorboard>=2.15"],
    "robotics": ["gymnasium-robotics>=1.3"],
    "dmc": ["shimmy[dm-control]>=2.0", "mujoco>=3.17,<4"],
    "ogbench": ["ogbench>=1.2.1", "dm_control>=1.0.50"],
    "export": ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3"],
    "hub": ["huggingface_hub>=1.0"],
    "behaviours": ["sbx-rl>=0.20"],
    "sb3": ["stable-baselines3~=2.9"],
    "torchrl": ["torchrl~=0.14.1"],
    "examples": ["scikit-learn>=1.4"],
    "report": ["jinja2>=3.1"],
}

setup(
    name="cpql",
    version="0.1.0",
    description="Consistency policies for offline reinforcement learning",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["cpql", "cpql.*"]), "cpql.configs"],
    package_dir={"cpql.configs": "configs"},
    package_data={
        "cpql": ["py.typed", "data/behaviours/*/*", "experiments/*.jinja", "experiments/*.yaml"],
        "cpql.configs": ["*.yaml", "*/*.yaml"],
    },
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "scipy>=1.15",
        "gymnasium[mujoco]>=1.0",
        "h5py>=3.10",
        "filelock>=3.24",
        "hydra-core>=1.3.5",
        "pydantic>=2.7",
        "safetensors>=0.4.3",
        "rich>=13.7",
        "matplotlib>=3.8",
        "minari[hdf5,hf]>=0.5.4",
        "wandb>=0.19.10",
    ],
    extras_require={
        **extras,
        "dev": [
            *extras["tensorboard"],
            *extras["robotics"],
            *extras["ogbench"],
            *extras["export"],
            *extras["hub"],
            *extras["sb3"],
            *extras["torchrl"],
            *extras["examples"],
            *extras["report"],
            "hypothesis>=6.100",
            "mypy>=1.15",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "ruff>=0.9",
            "types-PyYAML",
            "types-setuptools",
            "scipy-stubs",
        ],
    },
    entry_points={
        "console_scripts": [
            "cpql-train=cpql.cli:train",
            "cpql-evaluate=cpql.cli:evaluate",
            "cpql-export=cpql.cli:export",
            "cpql-data=cpql.data_cli:main",
            "cpql-results=cpql.results_cli:main",
            "cpql-report=cpql.report_cli:main",
        ],
    },
)
