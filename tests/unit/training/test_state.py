import random

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from ultrafuser.errors import CheckpointError
from ultrafuser.training.state import load_optimizer, load_random_state, save_optimizer, save_random_state


def training(seed=0, schedule="cosine"):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return model, optimizer, get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=9)


def step(model, optimizer, scheduler):
    loss = model(torch.linspace(-1, 1, 6).view(2, 3)).square().sum()
    loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return loss.item(), [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant_with_warmup"])
def test_an_optimiser_goes_on_as_if_it_had_not_stopped(tmp_path, schedule):
    first = training(schedule=schedule)
    for _ in range(3):
        step(*first)
    save_optimizer(first[1], first[2], tmp_path)
    second = training(seed=1, schedule=schedule)
    second[0].load_state_dict(first[0].state_dict())
    load_optimizer(second[1], second[2], tmp_path)
    assert [step(*first) for _ in range(4)] == [step(*second) for _ in range(4)]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_an_optimiser_that_never_stepped_is_kept_too(tmp_path):
    first, second = training(), training()
    save_optimizer(first[1], first[2], tmp_path)
    load_optimizer(second[1], second[2], tmp_path)
    assert step(*first) == step(*second)


def draws():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()


def test_random_states_come_back(tmp_path):
    random.gauss(0, 1)  # leaves a second number behind, as does numpy's
    np.random.randn()
    save_random_state(tmp_path, process=1)
    expected = draws()
    assert draws() != expected
    save_random_state(tmp_path, process=0)
    load_random_state(tmp_path, process=0, num_processes=2)
    assert draws() != expected
    load_random_state(tmp_path, process=1, num_processes=2)
    assert draws() == expected


@pytest.mark.parametrize("num_processes", [1, 3])
def test_random_states_of_another_number_of_processes_are_refused(tmp_path, num_processes):
    for process in range(2):
        save_random_state(tmp_path, process)
    with pytest.raises(CheckpointError, match=f"of 2 processes, but {num_processes} go on"):
        load_random_state(tmp_path, 0, num_processes)
