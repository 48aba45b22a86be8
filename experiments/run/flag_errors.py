"""What is said of flags that cannot be parsed: the libraries do not name fields in full."""

import re
from collections.abc import Sequence


def describe(error: Exception, argv: Sequence[str]) -> str:
    """Describes an error of parsing the flags in `argv`, in one sentence."""
    text = _innermost(error)
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}, is not Python: {error.msg}."
    if "no attribute 'get_config'" in text:
        return "the file of --config has no function get_config, which returns the config."
    if "Traceback" in text:  # of the config file
        return text.strip().splitlines()[-1]
    missing = re.search(r"Attempted \[.*?\]:\s+(\S+)\s+\[Errno 2\]", text)
    if missing:
        return f"the file of --config, {missing[1]}, does not exist."
    none = re.match(r"Override (\S+)\.\w+ can not be applied", text)
    if none:
        return (
            f"config.{none[1]} is None, so that its fields cannot be set one by one; give all of "
            f"it, as --config.{none[1]}='{{...}}'."
        )
    below = re.search(r"Attempting to lookup: (\S+)\.(\w+)$", text)
    if below:
        return f"config.{below[1]} has no fields, and so no {below[2]}."
    unknown = re.match(r"'(\w+)'(?:\nDid you mean \"(\w+)\")?", text)
    if unknown and isinstance(error, AttributeError | KeyError):
        path = _path_to(unknown[1], argv)
        close = f"; did you mean {path}{unknown[2]}?" if unknown[2] else "."
        return f"unknown field {path}{unknown[1]}{close}"
    return text


def _innermost(error):
    """The text of an error, out of the errors that it was made an argument of."""
    while isinstance(error, AttributeError | KeyError) and error.args:
        error = error.args[0]  # str() would quote the text once more
    return str(error)


def _path_to(name, argv):
    """What stands before a name in the flag that has it, as `config.train.`."""
    for argument in argv:
        path = argument.lstrip("-").partition("=")[0].split(".")
        if name in path[1:]:
            return "".join(f"{part}." for part in path[: path.index(name)])
    return ""
