"""The number of connections that a port may have, by the number of files that this process may open."""

import sys

_MOST = 1024


def count_connections() -> int:
    """Return the most connections of one port.

    Each of the two ports has a third of the files that the process may open. The rest is for models, the store and
    whatever libraries need: a process without a file to spare cannot even refuse a connection.
    """
    if sys.platform == "win32":
        return _MOST
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else min(_MOST, max(1, soft // 3))
