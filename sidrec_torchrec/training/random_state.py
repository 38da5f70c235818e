"""The state of this process's random generators as text, for a checkpoint to keep."""

import base64

import numpy as np
import torch


def random_state() -> dict[str, str]:
    """Of torch's generators, of the CPU and of the current GPU if there is one."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def set_random_state(state: dict[str, str]) -> None:
    """Goes on drawing where ``random_state`` was asked."""
    states = {
        device: torch.from_numpy(np.frombuffer(base64.b64decode(text), np.uint8).copy())
        for device, text in state.items()
    }
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
