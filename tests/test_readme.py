"""The README tells the truth about the config, the code and the example task."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.distributed.jobs import ROOT, train
from trainer.config.keys import load_config, parse
from trainer.ranks.workers import run_ranks

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


PAGES = [page for page in ROOT.rglob("*.md") if not {".venv", "runs", ".pytest_cache", ".hypothesis"} & set(page.parts)]
PACKAGES = sorted(path.parent for path in (ROOT / "trainer").glob("*/__init__.py"))


def test_the_front_page_is_short() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("page", sorted((ROOT / "trainer").rglob("README.md")), ids=lambda page: page.parent.name)
def test_the_page_of_a_package_is_a_page(page: Path) -> None:
    """Without its tables of keys, which are for looking things up. What is longer has a page of another name."""
    text = re.sub(r"<!-- keys: .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
    assert len(text.splitlines()) <= 130


def test_the_config_is_the_file() -> None:
    config = json.loads((ROOT / "ds_configs" / "strong.json").read_text())
    del config["$schema"]  # for editors alone
    assert config in [json.loads(block) for block in blocks("json")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_configs_on_every_page_are_right(page: Path) -> None:
    for block in re.findall(r"```json\n(.*?)```", page.read_text(), flags=re.DOTALL):
        parse(json.loads(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            path = (page.parent / file).resolve() if file else page
            assert path.exists(), target
            titles = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                      for line in path.read_text().splitlines() if line.startswith("#")] if anchor else []  # fmt: skip
            assert not anchor or anchor in titles, target


def test_every_config_file_is_explained() -> None:
    page = (ROOT / "ds_configs" / "README.md").read_text()
    for file in (ROOT / "ds_configs").glob("*.json"):
        assert f"`{file.name}`" in page, file.name


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_each_package_says_what_its_files_are_for(package: Path) -> None:
    table = "\n".join(line for line in (package / "README.md").read_text().splitlines() if line.startswith("|"))
    files = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    assert files <= set(re.findall(r"`(\w+\.py)`", table))
    assert f"  {package.name}/ " in README


def test_the_example_task_is_exact(tmp_path: Path) -> None:
    (example,) = blocks("python")
    (tmp_path / "my_task.py").write_text(example)
    summaries = []
    for W in (1, 2, 3):
        overrides = {
            "trainer.task": f"{tmp_path}/my_task.py:MyTask",
            "trainer.task_options": {},
            "train_batch_size": 64,
            "trainer.output_dir": str(tmp_path / str(W)),
            "trainer.epochs": 4,
        }
        summaries.append(run_ranks(train, W, load_config(ROOT / "ds_configs" / "strong.json", overrides))[0])
    assert summaries[0]["trace"] == summaries[1]["trace"] == summaries[2]["trace"]
    assert summaries[0]["metrics"]["test"]["accuracy"] > 0.6


def test_every_command_names_files_that_exist() -> None:
    for block in blocks("bash"):
        for path in re.findall(r"(?:launch|ds_configs|tests|trainer)/[\w/]+\.(?:py|sh|json)", block):
            assert (ROOT / path).is_file(), path
