"""The one error type that kvlocal raises on purpose."""


class KvlocalError(Exception):
    """A failure the user can act on; its text is one sentence that says what to do."""
