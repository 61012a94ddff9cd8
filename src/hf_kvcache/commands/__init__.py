"""The subcommands of `hf-kvcache`; importing them is cheap."""


class UserError(Exception):
    """A mistake in the arguments: its text is shown without a traceback, and the exit code is 2."""
