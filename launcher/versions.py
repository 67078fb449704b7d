"""Which versions of the stack are installed, read from their metadata: nothing is imported."""

from __future__ import annotations

import importlib.metadata
import platform

STACK = ("torch", "transformers", "peft", "deepspeed", "ray", "accelerate", "bitsandbytes", "datasets", "tokenizers", "safetensors")
"""What a run computes with."""
OPTIONAL = ("flash-attn", "liger-kernel", "wandb", "mlflow")


def read_version(package: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_versions() -> dict[str, str]:
    """Versions of Python, this package and what a run computes with; what is not installed is left out."""
    found = {name: version for name in ("lepton-launch", *STACK, *OPTIONAL) if (version := read_version(name))}
    return {"python": platform.python_version(), **found}
