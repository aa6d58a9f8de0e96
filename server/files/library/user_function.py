"""Functions of a user's own modules, named on the command line as `package.module:function`."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedbasin.server.files.reading import ModelError


def import_function(name: str, option: str) -> Callable[..., Any]:
    """Return the function `package.module:function`.

    Args:
        name: the module and the function.
        option: the option that names it, for errors.

    Raises:
        ModelError: there is no such module or function.
    """
    module_name, _, function = name.partition(":")
    # Modules beside the caller can be imported, as with `python -m`.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        value: Callable[..., Any] = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(
            f"{option} {name}: {error}; write package.module:function, importable from {Path.cwd()}"
        ) from error
    except (Exception, SystemExit) as error:  # the user's own code may raise anything, or be a script
        raise ModelError(f"{option} {name}: raised {type(error).__name__} while it was imported: {error}") from error
    if not callable(value):
        raise ModelError(f"{option} {name}: is a {type(value).__name__}; name a function")
    return value
