"""Imports PEFT, or says what to install.

A module that derives from its classes imports this one before any other that does: importing PEFT makes our kinds known
to it, for which all of those modules are imported.
"""

try:
    import peft  # noqa: F401
except ImportError as error:
    raise ImportError(
        'adapters on a model need PEFT: pip install "peft>=0.21" (their files are read and written without it)'
    ) from error
