"""The one error class that users meet."""


class InputError(ValueError):
    """Something the user gave is wrong: a file, a setting, a command line.

    The message names the file or key, the value found, the rule and the way out. Commands print it alone,
    without a traceback, and end with exit code 2.
    """
