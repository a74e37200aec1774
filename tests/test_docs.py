"""The pages name what there is, and their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from massl_fast.config import Config, recipe_names
from massl_fast.engine.phases import PHASES
from massl_fast.evaluation.registry import PROTOCOLS
from massl_fast.objectives import OBJECTIVES
from massl_fast.run.outputs import CLOCK_KEYS, DECLARATIONS
from test_rooms import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/**/*.md")])
OPTIONS = re.compile(r"--((?:{})\.[a-z_]+)".format("|".join(Config.model_fields)))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))]
    assert not [target for target in targets if target and "://" not in target and not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_pages_exist(page):
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    for option in OPTIONS.findall(page.read_text(encoding="utf-8")):
        section, key = option.split(".")
        assert section == "objective" or key in sections[section].model_fields, f"--{option}"


def test_every_objective_evaluation_and_recipe_has_its_place():
    for name in (name for name, where in OBJECTIVES.items() if isinstance(where, str)):  # others are plugins of other tests
        assert f"| `{name}` |" in text("README.md") and text("docs/objectives.md").count(f"| `{name}`") >= 3, name
    for name in (name for name, (where, _) in PROTOCOLS.items() if isinstance(where, str)):
        assert f"`{name}`" in text("README.md") and f"| `{name}` |" in text("docs/evaluation.md"), name
    named = text("README.md") + text("docs/objectives.md")
    for name in recipe_names():
        assert f"`{name}`" in named or name.removesuffix("_cifar10") in OBJECTIVES, name


def test_architecture_names_rooms_files_keys_and_phases():
    page = text("docs/architecture.md")
    rooms = [path.parent.name for path in (ROOT / "massl_fast").glob("*/__init__.py")]
    assert not [room for room in rooms if f"      {room}/" not in page and f"· {room}/" not in page and f"{room}/*" not in page]
    assert not [path.name for path in (ROOT / "kernels").glob("*.py") if path.name not in page]
    assert not [key for key in (*CLOCK_KEYS, *PHASES, DECLARATIONS) if f"`{key}`" not in page]


def test_architecture_names_every_module_of_the_package():
    """Commands, layouts, metrics and protocols are a file each by rule; docs/evaluation.md lists the last."""
    page = set(re.findall(r"\w+", text("docs/architecture.md")))
    protocols = [where.partition(":")[0].rpartition(".")[2] for where, _ in PROTOCOLS.values() if isinstance(where, str)]
    by_rule = {"__init__", "__main__", *protocols}
    found = [path for path in (ROOT / "massl_fast").rglob("*.py") if path.parent.name not in ("commands", "layouts", "metrics")]
    assert not [path for path in found if path.stem not in page | by_rule]


def test_architecture_has_the_order_of_rooms_that_the_imports_keep():
    order = text("docs/architecture.md").partition("    cli → ")[2].partition("\n\n")[0]
    written = [set(re.findall(r"\w+", floor)) for floor in f"cli → {order}".split("→")]
    assert written == FLOORS[1:]


def test_the_path_of_one_image_takes_at_most_thirteen_files_and_all_are_there():
    table = text("docs/architecture.md").partition("## The path of one image")[2].partition("## ")[0]
    files = re.findall(r"^\| `([a-z0-9_/]+\.py)` \|", table, re.MULTILINE)
    assert 0 < len(files) <= 13
    assert not [file for file in files if not (ROOT / file).is_file() and not (ROOT / "massl_fast" / file).is_file()]


def test_citation_changes_and_distribution_have_one_version_and_date():
    citation = yaml.safe_load(text("CITATION.cff"))
    assert f'version="{citation["version"]}"' in text("setup.py")
    assert f"## {citation['version']} – {citation['date-released']}\n" in text("CHANGELOG.md")


def test_the_site_builds_without_a_broken_link(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'massl-fast[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run([*command, "--config-file", str(ROOT / "mkdocs.yml")], capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stdout + built.stderr
    for page in PAGES:
        place = page.relative_to(ROOT).as_posix().removeprefix("docs/").lower().replace("readme.md", "index.md")
        assert (tmp_path / "site" / place.replace(".md", ".html")).is_file(), page
    assert "hooks.py" not in [path.name for path in (tmp_path / "site").rglob("*")]


def test_words_are_spelt_right():
    pytest.importorskip("codespell_lib", reason="codespell is not installed: pip install 'massl-fast[test]'")
    places = [str(ROOT / name) for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "setup.py")]
    places += [str(ROOT / name) for name in ("docs", "massl_fast", "kernels", "bench", "tests")]
    command = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml"), *places]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
