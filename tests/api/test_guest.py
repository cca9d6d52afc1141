"""The process in which a run is a guest: what is set for the run, and given back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer import UserError
from trainer.api import guest

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_taken_for_the_state_of_a_new_process_is_that() -> None:
    code = (
        "from trainer.api.guest import _settings\n"
        "for name, setting in _settings().items():\n"
        "    assert setting.fresh is None or name == 'precision' or setting.get() == setting.fresh, name\n"
        "setting = _settings()['precision']\n"
        "before = setting.get()\n"
        "assert before[:2] == setting.fresh[:2], before\n"  # of the newer way torch tells more than it was told
        "setting.put(setting.fresh)\n"
        "assert [p.replace('ieee', 'none') for p in setting.get()[2]] == list(before[2]), setting.get()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_setting_that_was_changed_comes_back() -> None:
    settings = guest._settings()
    before = {name: setting.get() for name, setting in settings.items()}
    changes = {
        "default dtype": torch.float64, "default device": "meta", "threads": 3, "gradients": False,
        "deterministic algorithms": (True, True), "denormal numbers": True, "oneDNN": False, "cuDNN": False,
        "precision": ("medium", *before["precision"][1:]), "flash attention": False, "autocast on cpu": True,
        "garbage collection": False, "environment": {**os.environ, "MINE": "1"},
    }  # fmt: skip
    try:
        for name, value in changes.items():
            settings[name].put(value)
        own = {name: setting.get() for name, setting in settings.items()}
        with guest.Host() as host:
            inside = {name: setting.get() for name, setting in settings.items()}
            for name in changes.keys() - {"threads", "environment", "precision"}:
                assert inside[name] == settings[name].fresh, name
            assert inside["precision"][:2] == ("highest", True)
            torch.rand(3)
            with host.at_home():
                assert {n: s.get() for n, s in settings.items() if "random" not in n} == (
                    {n: value for n, value in own.items() if "random" not in n}
                )
                settings["threads"].put(2)
            assert settings["threads"].get() == 3  # of the run: nothing has set it there
        assert settings["threads"].get() == 2
        settings["threads"].put(3)
        after = {name: setting.get() for name, setting in settings.items()}
        for name, value in own.items():
            assert repr(after[name]) == repr(value), name
    finally:
        for name, value in before.items():
            settings[name].put(value)


def test_what_a_guest_cannot_live_with(group_of_one: None) -> None:
    with pytest.raises(UserError, match="This process has joined a process group"), guest.hosted():
        pass


def test_a_device_that_surrounds_the_call_is_refused() -> None:
    with torch.device("meta"):
        with pytest.raises(UserError, match=r"inside `with torch.device\(...\)`"), guest.Host():
            pass
        assert torch.get_default_device().type == "meta"
    assert torch.get_default_device().type == "cpu"


def test_one_guest_at_a_time() -> None:
    with guest.hosted(), pytest.raises(UserError, match="Another run is under way in this process"), guest.hosted():
        pass
    with guest.hosted():  # and again, now that the first has left
        pass
