"""Everything a training needs to go on as if it had never stopped, in safetensors and JSON.

Hugging Face's Trainer keeps optimiser, scheduler and random states as pickles; here nothing is unpickled.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ultrafuser.errors import CheckpointError

TENSORS = "training_state.safetensors"
SETTINGS = "training_state.json"


def save_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
    """Write optimiser and scheduler.

    Args:
        optimizer: any optimiser whose state is tensors and plain numbers per parameter.
        scheduler: a learning-rate scheduler.
        folder: of the checkpoint.
    """
    content = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, state in content["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value.contiguous()
            else:
                plain[f"{index}/{key}"] = value
    schedule = {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"}
    save_file(tensors, folder / TENSORS)
    settings = {"state": plain, "param_groups": content["param_groups"], "schedule": schedule}
    (folder / SETTINGS).write_text(json.dumps(settings))


def load_optimizer(optimizer: torch.optim.Optimizer, scheduler: Any, folder: Path) -> None:
    """Take over what `save_optimizer` wrote."""
    settings = json.loads((folder / SETTINGS).read_text())
    state: dict[int, dict[str, Any]] = {}
    for name, value in (*load_file(folder / TENSORS).items(), *settings["state"].items()):
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": settings["param_groups"]})
    scheduler.load_state_dict(settings["schedule"] | {"lr_lambdas": scheduler.state_dict().get("lr_lambdas")})


def save_random_state(folder: Path, process: int) -> None:
    """Write the random states of Python, numpy and torch of one process."""
    version, python_state, gauss = random.getstate()
    _, numpy_state, position, has_gauss, numpy_gauss = np.random.get_state()
    tensors = {
        "python": torch.tensor(python_state, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(numpy_state, dtype=np.int64)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"random_{process}.safetensors")
    plain = {"version": version, "gauss": gauss, "numpy": [position, has_gauss, numpy_gauss]}
    (folder / f"random_{process}.json").write_text(json.dumps(plain))


def load_random_state(folder: Path, process: int, num_processes: int) -> None:
    """Take over what `save_random_state` wrote for this process.

    Raises:
        CheckpointError: another number of processes wrote the checkpoint, or one of them was stopped before it had.
    """
    written = len(list(folder.glob("random_*.json")))  # the second of two files
    if written != num_processes:
        raise CheckpointError(
            f"{folder} holds the random states of {written} processes, but {num_processes} go on with it, so that the "
            "result would be another. Start as many as before; if it was as many, delete this checkpoint: the one "
            "before it is used then."
        )
    tensors = load_file(folder / f"random_{process}.safetensors")
    plain = json.loads((folder / f"random_{process}.json").read_text())
    random.setstate((plain["version"], tuple(tensors["python"].tolist()), plain["gauss"]))
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *plain["numpy"]))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
