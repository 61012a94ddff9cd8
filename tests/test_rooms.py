"""Which tests CI runs: what `.ci/room` says of changes, and what the marks leave for `make test`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from rooms import HEAVY, by_weight, levels, telling

from hf_kvcache.kernels import native

ROOT = Path(__file__).parents[1]
WHO = {f"GIT_{role}_{what}": f"{what}@here" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
FILES = ("README.md", "src/hf_kvcache/layer.py", "kernels/op/native.cpp", "tests/test_quick.py", "tests/test_long.py")

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not here")


class Tree:
    """A checkout of this project's shape."""

    def __init__(self, root, **more):
        self.root, self.environment = root, os.environ | WHO | {"GIT_CONFIG_GLOBAL": os.devnull} | more
        # hooks and the like set them for their own repository
        for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "BASE"):
            self.environment.pop(name, None)

    def run(self, *command, **more):
        done = subprocess.run(
            command, cwd=self.root, env=self.environment | more, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def commit(self, name="README.md"):
        self.write(name, (self.root / name).read_text() + "more\n" if (self.root / name).exists() else "new\n")
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", name)

    def room(self, **more):
        return self.run("bash", ".ci/room", **more)


@pytest.fixture
def tree(tmp_path):
    """A branch that is one commit ahead of `main`."""
    tree = Tree(tmp_path, GIT_CEILING_DIRECTORIES=str(tmp_path.parent))
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "room", tmp_path / ".ci")
    for name in FILES:
        tree.write(name, "@pytest.mark.slow\n" if "long" in name else "first\n")
    tree.run("git", "init", "--quiet", "--initial-branch", "main")
    tree.commit()
    tree.run("git", "switch", "--quiet", "--create", "branch")
    tree.commit()
    return tree


@needs_git
@pytest.mark.parametrize(
    "name, room",
    [
        ("README.md", "test"),
        ("src/hf_kvcache/layer.py", "test"),
        ("tests/test_quick.py", "test"),
        ("tests/test_long.py", "test-all"),
        ("kernels/op/native.cpp", "test-all"),
        ("trainers/new.py", "test-all"),
        ("src/hf_kvcache/kernels/native.py", "test-all"),
        ("src/hf_kvcache/hub/export.py", "test-all"),
        ("tests/hub/bare.py", "test-all"),
        ("tests/conftest.py", "test-all"),
        ("setup.cfg", "test-all"),
        ("docs/kernels/setup.cfg", "test"),
    ],
)
def test_what_a_change_asks_for(tree, name, room):
    tree.commit(name)
    assert tree.room() == room
    # the same when something else follows
    tree.commit()
    assert tree.room() == room


@needs_git
@pytest.mark.parametrize("name", ["kernels/op/native.cpp", "trainers/new.py"])
def test_what_is_not_committed_counts(tree, name):
    tree.write(name, "other\n")
    assert tree.room() == "test-all"


@needs_git
def test_files_that_go_count(tree):
    tree.run("git", "mv", "kernels/op/native.cpp", "elsewhere.cpp")
    tree.commit()
    assert tree.room() == "test-all"


@needs_git
def test_what_others_have_landed_since_does_not_count(tree):
    tree.run("git", "switch", "--quiet", "main")
    tree.commit("kernels/op/native.cpp")
    tree.run("git", "switch", "--quiet", "branch")
    assert tree.room() == "test"


@needs_git
def test_when_in_doubt_everything(tree):
    tree.run("git", "switch", "--quiet", "main")
    assert tree.room() == "test-all"
    tree.run("git", "switch", "--quiet", "branch")
    assert tree.room() == "test"
    tree.run("git", "branch", "--quiet", "--delete", "--force", "main")
    assert tree.room() == "test-all"
    # unless it is said
    assert tree.room(BASE="HEAD~1") == "test"
    assert tree.room(BASE="nowhere") == "test-all"
    shutil.rmtree(tree.root / ".git")
    assert tree.room() == "test-all"


@needs_git
def test_the_main_branch_of_where_it_was_cloned_from(tree):
    clone = Tree(tree.root / "clone", GIT_CEILING_DIRECTORIES=str(tree.root))
    tree.run("git", "switch", "--quiet", "main")
    tree.run("git", "clone", "--quiet", str(tree.root), "clone")
    # what is here called main goes on
    clone.commit()
    assert clone.room() == "test"
    clone.commit("trainers/new.py")
    assert clone.room() == "test-all"


def test_marks():
    first, *others = levels("scalar")
    assert first == native.supported()[0] and "scalar" not in [other.values[0] for other in others]
    assert all([mark.name for mark in other.marks] == ["slow"] for other in others)
    one, two = telling(["a", "b"], "b")
    assert one.values == ("a",) and two == "b"
    with pytest.raises(AssertionError, match="not all among"):
        telling(["a", "b"], "c")


def test_heavy_files_are_there_and_come_first():
    tests = ROOT / "tests"
    assert all((tests / name).exists() for name in HEAVY)
    places = [by_weight(tests / name) for name in ("dmc/test_recall.py", "dmc/test_dmc_files.py", "test_rooms.py")]
    assert places == sorted(places) and places[-1] == len(HEAVY)
