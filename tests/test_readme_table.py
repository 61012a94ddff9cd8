"""README.md and docs/ show what the registry and the results hold, and every relative link leads somewhere."""

import re
import sys
from pathlib import Path

import pytest

from hf_kvcache.commands import methods
from hf_kvcache.eval import specs
from hf_kvcache.registry import METHODS, load

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
TEXTS = [README, *sorted(DOCS.glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "LOG.md", ROOT / "model_cards/README.md"]


@pytest.fixture
def tables(monkeypatch):
    """The script that writes the tables of docs/benchmarks.md."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    yield tables
    for name in ("tables", "choosing", "evaluation_tables", "trained_table", "turns_table"):
        sys.modules.pop(name, None)


def block(path, name, end=None):
    """What stands between the markers of a block."""
    return path.read_text(encoding="utf-8").split(f"<!-- {name} -->")[1].split(f"<!-- /{end or name} -->")[0].strip()


def test_readme_has_the_table_of_methods():
    assert block(README, "methods") == methods.markdown(), "paste the output of `hf-kvcache methods --markdown`"


@pytest.mark.parametrize("name", methods.pages())
def test_a_page_has_the_table_of_its_methods(name):
    found = block(DOCS / f"{name}.md", f"methods {name}", "methods")
    assert found == methods.page(name), f"paste the output of `hf-kvcache methods --markdown --page {name}`"


def test_every_method_with_a_paper_has_its_number():
    assert [m.name for m in METHODS if bool(m.paper) != bool(re.fullmatch(r"\d{4}\.\d{5}", m.arxiv))] == []


@pytest.mark.parametrize("method", [m for m in METHODS if m.arxiv], ids=lambda m: m.name)
def test_a_docstring_names_the_paper_that_the_registry_knows(method):
    assert f"arXiv {method.arxiv}" in load(method.factory).__doc__


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_benchmarks_are_those_of_the_results(tables):
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(text) == text, "run `python benchmarks/tables.py`"
    # one stands in the table of decoding, one is the picture in the README
    shown = {file for _, file, _ in tables.BLOCKS.values()} | {"prefill", "demo-embedded"}
    # what other pages show
    shown |= {"evidence-smollm2", "claims-smollm2", "presses-smollm2", "presses-embedded"}
    # what stands in the text of tuning.md, eviction.md, low-rank.md and retrofits.md
    shown |= {"tuning-smollm2", "trained-smollm2"}
    found = {path.name.removesuffix("-cpu.json") for path in tables.RESULTS.glob("*.json")}
    # answers from which evidence is made
    assert {name for name in found if not name.startswith("quality-")} == shown


def test_other_pages_are_those_of_the_results(tables):
    assert DOCS / "choosing.md" in tables.PAGES
    for page, make in tables.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text, make) == text, f"{page.name}: run `python benchmarks/tables.py`"


def test_a_page_without_a_block_is_not_filled(tables):
    text = tables.PAGE.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="blocks are"):
        tables.filled(text.replace("<!-- recall -->", ""))
    with pytest.raises(ValueError, match="blocks are missing: chooser"):
        tables.filled(text, {"chooser": str})


def test_compared_is_what_the_command_compares(tables, monkeypatch):
    """The rows of `make demo` first, then the others of `--all`."""
    monkeypatch.setattr(specs, "is_installed", lambda name: True)
    rows = [row["cache"] for row in tables.load("compare-embedded")["rows"]]
    ten = [spec.text for spec in specs.default_specs()]
    assert rows == [*ten, *(spec.text for spec in specs.all_specs() if spec.text not in ten)]


def test_the_picture_is_drawn_from_what_the_demo_compares(tmp_path, monkeypatch, tables):
    pytest.importorskip("matplotlib")
    import picture

    monkeypatch.setattr(picture, "PICTURE", tmp_path / "compare.png")
    monkeypatch.setattr(picture.choosing, "PICTURE", tmp_path / "front.png")
    picture.main()
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    sys.modules.pop("picture")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(specs, "is_installed", lambda name: True)
    assert [row["cache"] for row in tables.load("demo-embedded")["rows"]] == [s.text for s in specs.default_specs()]


def anchors(path):
    """What GitHub calls the headings of a page."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"docs/[\w-]+\.md", README.read_text(encoding="utf-8")))
    assert {f"docs/{path.name}" for path in DOCS.glob("*.md")} == linked
