"""The site that Sphinx builds of the documents."""

import html
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer.main

import jx_neuron
from jx_neuron.cli.app import app

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the HTML that Sphinx builds of the documents."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", folder]
    subprocess.run(command, check=True)
    return folder


@pytest.mark.slow
def test_options_of_the_site_can_be_copied(site: Path) -> None:
    pages = {page.relative_to(site).with_suffix(""): page.read_text() for page in site.rglob("*.html")}
    texts = {name: html.unescape(re.sub("<[^>]*>", "", page)) for name, page in pages.items()}
    commands = typer.main.get_command(app).commands.values()
    options = {option for command in commands for parameter in command.params for option in parameter.opts}
    assert {option for option in options if option.startswith("--")} <= set(
        re.findall(r"--\w[\w-]*", texts[Path("command-line")])
    )
    for name, text in texts.items():
        assert not re.search(r"(?<![\w\s])[–—]\w|(?<=\s)[–—][a-z]", text), name
    for path in (ROOT / "docs").rglob("*.md"):
        name = path.relative_to(ROOT / "docs").with_suffix("")
        assert set(re.findall(r"--\w[\w-]*", path.read_text())) <= set(re.findall(r"--\w[\w-]*", texts[name]))


@pytest.mark.slow
def test_the_site_is_built_and_its_reference_whole(site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        documented = {name for kind in InventoryFile.load(file, "", lambda *_: "").values() for name in kind}
    for module in (jx_neuron, *map(import_module, ("jx_neuron.lowering", "jx_neuron.planning"))):
        names = set(module.__all__) - {"__version__"}
        assert {f"{module.__name__}.{name}" for name in names} <= documented
