"""Where tensors live."""

from __future__ import annotations

import torch

from cpql.errors import ConfigError

__all__ = ["choose_device"]


def choose_device(name: str | torch.device) -> torch.device:
    """The device of a name; `auto` is a GPU where there is one.

    Raises:
        ConfigError: PyTorch knows no such device, or a CUDA device is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: expected auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={name}: PyTorch finds no such CUDA device here; use device=auto or device=cpu"
        )
    return device
