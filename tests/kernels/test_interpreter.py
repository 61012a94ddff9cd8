"""Triton kernels in its interpreter: what is not slow of all files, in one process."""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from rooms import is_whole  # noqa: E402
from test_triton import INTERPRETED, ON_GPU, run_in_the_interpreter  # noqa: E402


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="tests of kernels run here directly")
def test_every_kernel(pytestconfig):
    if is_whole(pytestconfig):
        pytest.skip("every file has a process of its own")
    run_in_the_interpreter(*sorted(Path(__file__).parent.glob("test_*triton.py")), config=pytestconfig)
