"""Shared by all tests. The table of methods and the tiny models are in `cases.py`."""

import contextlib
import importlib
import logging
import re
import signal
import warnings

import pytest
import rooms
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from hf_kvcache import warn
from hf_kvcache.kernels import native

# seconds to compile: 18, 16, 12, 8 and 4; all others take less
SLOW_TO_BUILD = ("ragged_attention", "quant_attention", "sparse_attention", "lowrank_attention", "dense_attention")

# the models are tiny: a second thread costs ten times what it gains
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


class Deprecations(logging.Handler):
    """Raises for what transformers logs about names that will go away, and drops its other warnings."""

    pattern = re.compile(r"deprecat|will be removed", re.IGNORECASE)
    # assisted decoding calls its draft model in a way that transformers itself has deprecated
    their_own = re.compile("Passing `generation_config` together with")

    def emit(self, record):
        if self.pattern.search(record.getMessage()) and not self.their_own.search(record.getMessage()):
            raise AssertionError(f"transformers: {record.getMessage()}")


def pytest_configure():
    # what ends a run ends as by Ctrl-C, and the compilers and processes that it has started with it
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_deprecated():
    """Nothing asks transformers for what it has deprecated: it warns of some of that, and only logs the rest."""
    # what was logged once is logged again
    logging.Logger.warning_once.cache_clear()
    transformers.logging.set_verbosity_warning()
    logger, handler = logging.getLogger("transformers"), Deprecations(logging.WARNING)
    before, logger.handlers = logger.handlers, [handler]
    yield
    logger.handlers = before
    transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def quiet_fallback():
    """Which backend runs an op is said once per process; only the tests of the dispatcher look at that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="hf_kvcache: .* runs on the PyTorch reference")
        yield


@pytest.fixture
def unsaid(monkeypatch):
    """What was said before is said again."""
    monkeypatch.setattr(warn, "_said", set())


@pytest.fixture(autouse=True)
def auto_classes():
    """What a test makes known to the Auto classes is not known to the next one."""
    mappings = CONFIG_MAPPING, AutoModel._model_mapping, AutoModelForCausalLM._model_mapping
    before = [dict(mapping._extra_content) for mapping in mappings]
    yield
    for mapping, content in zip(mappings, before, strict=True):
        mapping._extra_content.clear()
        mapping._extra_content.update(content)


def pytest_collection_modifyitems(items):
    """Heavy files first, the tests of a file in their order."""
    items.sort(key=lambda item: rooms.by_weight(item.path))


def pytest_collection_finish(session):
    """Compile native code before the first test asks for it: each worker its share, or they would build the same."""
    if session.config.option.collectonly or not any("kernels" in item.path.parts for item in session.items):
        return
    worker = getattr(session.config, "workerinput", {"workerid": "gw0", "workercount": 1})
    levels = native.supported() if rooms.is_whole(session.config) else native.supported()[:1]
    # dealt out in this order, shares take about as long
    ops = sorted(native.OPS, key=lambda op: (*SLOW_TO_BUILD, op).index(op))
    jobs = [(op, isa) for isa in levels for op in ops]
    for op, isa in jobs[int(worker["workerid"][2:]) :: worker["workercount"]]:
        importlib.import_module(f"hf_kvcache.kernels.{op}")
        # found again by the test that needs the library
        with contextlib.suppress(native.BuildError):
            native.build(op, isa)
