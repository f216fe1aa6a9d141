"""`wsss info`: what is installed, and which methods there are."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import wsss_kernels

PACKAGES = ("torch", "torchvision", "timm", "transformers", "diffusers", "segmentation-models-pytorch", "accelerate", "numpy", "pillow")
PACKAGES += ("scikit-image", "nibabel", "pydicom", "openpyxl", "pyyaml", "safetensors")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Of everything that a result may depend on."""
    found = {package: _version(package) for package in PACKAGES}
    return {"wsss_kernels": wsss_kernels.__version__, "python": platform.python_version(), **found, "torch": str(torch.__version__)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(args: argparse.Namespace) -> int:
    """Prints."""
    from .method import names

    print(wsss_kernels.info())
    print(f"methods       {', '.join(names()) or 'none'}")
    for package in PACKAGES:
        print(f"  {package:<28}{_version(package)}")
    return 0
