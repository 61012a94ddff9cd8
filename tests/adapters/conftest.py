"""An adapter of every kind, for tests that ask all kinds the same."""

import pytest
from kinds import KINDS


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """A kind, and a folder with an adapter of it."""
    folder = tmp_path_factory.mktemp(request.param) / "good"
    KINDS[request.param][0](folder)
    return request.param, folder


@pytest.fixture
def kind(made):
    return made[0]
