"""Package layout: top-level ``kernels/`` and ``bench/`` install as parts of ``fastlora``.

``kernels`` is also the name of a package of Hugging Face that transformers looks for, so the folder
has no ``__init__.py``: started in the repository root, transformers sees a bare namespace, which it
ignores. ``bench`` has none either. Everything else about the project stands in ``pyproject.toml``.
"""

from setuptools import setup

setup(
    packages=[
        "fastlora",
        "fastlora.bench",
        "fastlora.commands",
        "fastlora.algebra",
        "fastlora.autograd",
        "fastlora.init",
        "fastlora.model",
        "fastlora.optimizers",
        "fastlora.ops",
        "fastlora.ops.torch",
        "fastlora.ops.triton",
        "fastlora.routing",
        "fastlora.testing",
        "fastlora.integrations",
        "fastlora.integrations.vllm",
        "fastlora.kernels",
        "fastlora.layers",
        "fastlora.layers.quantized",
        "fastlora.pool",
        "fastlora.serve",
        "fastlora.train",
        "fastlora.train.data",
        "fastlora.utils",
    ],
    py_modules=["fastlora_vllm"],
    package_dir={
        "fastlora": "fastlora",
        "fastlora.bench": "bench",
        "fastlora.kernels": "kernels",
    },
    package_data={
        "fastlora": ["py.typed"],
        "fastlora.kernels": ["candidates/*.json", "measured/*.json"],
    },
)
