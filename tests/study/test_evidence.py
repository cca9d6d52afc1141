"""The packed results of our own studies: whoever unpacks them can make their pages again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from trainer.study.results import Results
from trainer.study.sentences import verdicts

ROOT = Path(__file__).parents[2]
# The larger ones take half a minute together.
EVIDENCE = [
    pytest.param(file, marks=pytest.mark.slow if file.stat().st_size > 1_000_000 else (), id=file.name.split(".")[0])
    for file in sorted((ROOT / "trainer" / "study" / "evidence").glob("*.tar.xz"))
]


@pytest.fixture(scope="module", params=EVIDENCE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    subprocess.run(["tar", "-C", str(folder), "-xf", str(request.param)], check=True)  # as RESULTS.md says
    (study,) = folder.iterdir()
    assert study.name == request.param.name.removesuffix(".tar.xz")
    return study


def test_every_declared_run_is_there(folder: Path) -> None:
    results = Results(folder)
    assert results.missing() == 0
    assert len({run["code_sha256"] for run in results.runs.values()}) == 1
    assert len({run["device_model"] for run in results.runs.values()}) == 1
    assert any("does the typical run lose" in line for line in verdicts(folder))


def test_it_names_a_ready_config_and_no_path_of_one_machine(folder: Path) -> None:
    declared = json.loads((folder / "study.json").read_text())
    data = declared["base"]["trainer"].get("task_options", {}).get("data", "")
    assert not Path(data).is_absolute()
    assert " /" not in declared["command"] and "=/" not in declared["command"]
    (config,) = [word for word in declared["command"].split() if word.endswith(".json")]
    assert (ROOT / config).is_file()
