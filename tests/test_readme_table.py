"""README.md shows what the registry holds."""

from pathlib import Path

from hf_kvcache.commands.methods import markdown

README = Path(__file__).parents[1] / "README.md"


def test_readme_has_the_table_of_methods():
    text = README.read_text(encoding="utf-8")
    block = text.split("<!-- methods -->")[1].split("<!-- /methods -->")[0]
    assert block.strip() == markdown(), "paste the output of `hf-kvcache methods --markdown` between the markers"
