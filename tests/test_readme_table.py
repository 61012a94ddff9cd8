"""README.md shows what the registry holds."""

from pathlib import Path

from hf_kvcache.commands.methods import markdown
from hf_kvcache.eval import specs

README = Path(__file__).parents[1] / "README.md"


def test_readme_has_the_table_of_methods():
    text = README.read_text(encoding="utf-8")
    block = text.split("<!-- methods -->")[1].split("<!-- /methods -->")[0]
    assert block.strip() == markdown(), "paste the output of `hf-kvcache methods --markdown` between the markers"


def test_readme_compares_what_the_command_compares(monkeypatch):
    """The table of ten has the rows of `make demo`, and with the other one those of `--all`."""
    monkeypatch.setattr(specs, "is_installed", lambda name: True)
    text = README.read_text(encoding="utf-8")
    block = text.split("<!-- compare -->")[1].split("<!-- /compare -->")[0]
    ten, rest = ([line.split("`")[1] for line in part.splitlines() if line[:3] == "| `"] for part in halves(block))
    assert ten == [spec.text for spec in specs.default_specs()]
    assert rest == [spec.text for spec in specs.all_specs() if spec.text not in ten]


def halves(block):
    shown, _, folded = block.partition("<details>")
    return shown, folded
