"""Shared by all tests. The table of methods and the tiny models are in `cases.py`."""

import warnings

import pytest
import torch
import transformers

# the models are tiny: a second thread costs ten times what it gains
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def quiet_fallback():
    """Which backend runs an op is said once per process; only the tests of the dispatcher look at that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="hf_kvcache: .* runs on the PyTorch reference")
        yield
