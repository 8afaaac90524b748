"""The one exception that the demo's command turns into one line and a non-zero exit code."""


class DemoError(RuntimeError):
    """Something that the user can understand and act upon; its message is one line."""
