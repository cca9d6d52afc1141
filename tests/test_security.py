"""Nothing runs, listens or is written down that nobody asked for."""

from __future__ import annotations

import contextlib
import inspect
import io
import ipaddress
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.jobs import ROOT, small_config, train
from trainer.config.keys import Config
from trainer.data import pretrained
from trainer.ranks.place import Ranks
from trainer.ranks.workers import run_ranks
from trainer.tasks.first_look import BUILT_IN

SECRETS = {
    "HF_TOKEN": "hf_aVerySecretTokenOfHuggingFace",
    "HUGGING_FACE_HUB_TOKEN": "hf_anotherSecretTokenOfTheHub",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdefdeadbeef",
    "AWS_ACCESS_KEY_ID": "AKIAVERYSECRETKEYID0",
    "AWS_SECRET_ACCESS_KEY": "aVery/Secret+Access/Key+Of40Characters00",
    "GITHUB_TOKEN": "ghp_aVerySecretTokenOfGitHub00000000",
}
BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 16, "vocab_size": 40,
}  # fmt: skip


# ---------------------------------------------------------------- code that comes with models


@pytest.mark.parametrize("name", BUILT_IN)
def test_remote_code_is_off_unless_asked_for(name: str) -> None:
    cls = __import__(f"trainer.tasks.{name}", fromlist=["TASK"]).TASK
    option = inspect.signature(cls).parameters.get("trust_remote_code")
    assert option is None or option.default is False


@pytest.mark.parametrize("function", [pretrained.configuration, pretrained.build, pretrained.tokenizer_of])
def test_remote_code_is_off_in_every_reader(function: Any) -> None:
    assert inspect.signature(function).parameters["trust_remote_code"].default is False


def use_caches(folder: Path) -> None:
    os.environ |= {"TRAINER_CACHE": f"{folder}/cache", "HF_DATASETS_CACHE": f"{folder}/datasets"}
    os.environ |= {"HF_MODULES_CACHE": f"{folder}/modules", "HF_HUB_OFFLINE": "1"}


def console_of(ranks: Ranks, config: Config) -> str:
    """What a run prints."""
    use_caches(Path(config.trainer.output_dir or "").parent)
    with contextlib.redirect_stdout(io.StringIO()) as console:
        train(ranks, config)
    return console.getvalue()


@pytest.mark.parametrize("trust", [False, True])
def test_remote_code_is_said_on_the_console(tmp_path: Path, trust: bool) -> None:
    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    rows = [{"text": f"{word} {i % 7}", "label": word} for i in range(8) for word in ("warm", "cold")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pretrained.configuration(BERT).save_pretrained(model)
    options = {"data": str(data), "model": str(model), "pretrained": False, "tokenizer": "words"}
    options["trust_remote_code"] = trust
    config = small_config(
        tmp_path / "run", task="text_classification", task_options=options, train_batch_size=8,
        train_micro_batch_size_per_gpu=4, epochs=1,
    )  # fmt: skip
    (console,) = run_ranks(console_of, 1, config)
    assert ("trust_remote_code is on: Python code that comes with" in console) == trust
    assert (str(model) in console) == trust


def test_the_note_on_remote_code_names_each_source_once() -> None:
    assert pretrained.trust_note(False, "a", "b") == []
    assert pretrained.trust_note(True, {"model_type": "bert"}, None) == []
    assert pretrained.trust_note(True, "a", "a") == [
        "trust_remote_code is on: Python code that comes with a may run here"
    ]
    assert "with a and b may" in pretrained.trust_note(True, "a", "b")[0]


# ---------------------------------------------------------------- secrets


def test_secrets_of_the_environment_are_written_nowhere(tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "run",
        tensorboard={"enabled": True},
        checkpoint={"every_steps": 3},
        log_every_steps=2,
    )
    consoles = run_ranks(console_of, 2, config, environment=SECRETS)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    folders = {path.relative_to(tmp_path / "run").parts[0] for path in files}
    assert {"manifest.json", "summary.json", "metrics.jsonl", "model", "tensorboard", "logs", "checkpoints"} <= folders
    contents = {str(path): path.read_bytes() for path in files} | {"console": "".join(consoles).encode()}
    assert b"parameters" in contents["console"]
    for where, content in contents.items():
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, f"{name} is in {where}"


# ---------------------------------------------------------------- listening


def listening(pid: int | str) -> list[str]:
    """The addresses at which a process listens, as "address:port"."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.update(re.findall(r"^socket:\[(\d+)\]$", os.readlink(descriptor)))
    found = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:  # TCP_LISTEN
                    address, port = fields[1].split(":")
                    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                    found.append(f"{ipaddress.ip_address(b''.join(words))}:{int(port, 16)}")
    return found


def is_local(listener: str) -> bool:
    address = ipaddress.ip_address(listener.rpartition(":")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def test_the_check_sees_what_listens() -> None:
    import socket

    for address, local in (("127.0.0.1", True), ("0.0.0.0", False)):
        with socket.socket() as listener:
            listener.bind((address, 0))
            listener.listen()
            place = f"{address}:{listener.getsockname()[1]}"
            assert place in listening("self")
            assert is_local(place) == local
    assert not is_local(":::80")
    assert is_local("::1:80")
    assert is_local("::ffff:127.0.0.1:80")


def listeners_of_a_run(ranks: Ranks, config: Config) -> list[str]:
    """Where a rank listens in the middle of a run: what torch's stores, gloo and the trainer have opened."""
    from trainer.run.run import run

    found: set[str] = set()

    def watch(step: int, engine: Any, losses: Any) -> None:
        found.update(listening("self"))

    run(config, ranks, config_name="test", started_at_s=time.time(), trace=watch)
    return sorted(found)


def test_the_ranks_of_one_machine_listen_on_loopback_only(tmp_path: Path) -> None:
    found = run_ranks(listeners_of_a_run, 2, small_config(tmp_path / "run"))
    assert found[0], "rank 0 keeps the store that the ranks meet at"
    outside = [listener for listeners in found for listener in listeners if not is_local(listener)]
    assert not outside


def test_tensorboard_listens_on_loopback_only(tmp_path: Path) -> None:
    script = (ROOT / "launch" / "tensorboard.sh").read_text()
    call = re.search(r'^exec tensorboard (.*) "\$@"$', script, re.MULTILINE)
    assert call is not None
    arguments = call[1].replace("runs", str(tmp_path)).split()
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *arguments, "--port", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + 120
        while not (found := listening(process.pid)):
            assert process.poll() is None, "TensorBoard ended"
            assert time.monotonic() < deadline_s, "TensorBoard does not listen"
            time.sleep(0.1)
        assert all(is_local(listener) for listener in found), found
    finally:
        process.kill()
        process.wait()
