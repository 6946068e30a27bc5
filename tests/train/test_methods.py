"""The comparison of methods spends the same on each."""

import argparse
from pathlib import Path

import pytest

from benchmarks import methods
from training.config import parse

pytestmark = pytest.mark.train


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_spends_the_budget_of_unet_forwards(name, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(methods.subprocess, "run", lambda command, check: commands.append(command))
    options = argparse.Namespace(work_dir=tmp_path, budget=40_000, train_batch_size=24, seed=0)
    methods.train(name, options)
    (command,) = commands
    assert Path(command[1]).name == "distill.py"
    config = parse([str(word) for word in command[2:]])
    # By hand: guided teacher steps of k/k_phi count 2 each, student forward 1 and backward 2, target 1.
    cost = config.train_batch_size * (2 * config.skip // config.solver_skip + 4)
    assert abs(config.max_train_steps * cost - options.budget) <= cost / 2
