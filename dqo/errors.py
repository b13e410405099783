"""The one error class for a user's mistake: shown as a message, never as a traceback."""


class DQOError(Exception):
    """A mistake in what the user gave (recipe, data, model path, endpoint) or a condition only the user can change.

    The message names the file, the line or field, the value seen and what was expected.
    """
