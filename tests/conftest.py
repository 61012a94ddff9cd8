"""Shared by all tests. The table of methods and the tiny models are in `cases.py`."""

import logging
import os
import re
import signal
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from hf_kvcache import warn

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


COMPILE_ALL = """
from hf_kvcache.kernels import native
for op in native.OPS:
    __import__(f"hf_kvcache.kernels.{op}")
    for isa in native.supported():
        native.build(op, isa)
"""


def pytest_collection_finish(session):
    """Compile native code for all instruction sets beside the first tests, which leave a core to spare."""
    is_first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    has_kernels = any("kernels" in item.path.parts for item in session.items)
    if not (is_first and has_kernels) or session.config.option.collectonly:
        return
    # in a process of its own: tests change the environment. A failure is found again by the test that needs the library
    session.compiling = subprocess.Popen(
        [sys.executable, "-c", COMPILE_ALL], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
    )


def pytest_sessionfinish(session):
    compiling = getattr(session, "compiling", None)
    if compiling is not None:
        # as by Ctrl-C: it ends its compilers and removes what is half compiled
        compiling.send_signal(signal.SIGINT)
        compiling.wait(30)
