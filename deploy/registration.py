"""The registration of SuperNodes' keys, those that the SuperLink does not know yet.

python -m fedbasin.deploy.registration secrets/nodes
"""

import sys
from pathlib import Path

from fedbasin.server.flower_run import FlowerRunError, flwr_output

_KNOWN = "already in use"


def register(folder: Path, superlink: str = "") -> list[str]:
    """Register the public keys in a folder, and return the names of those that were new.

    Args:
        folder: folder of the keys, `*.pub` in OpenSSH's form.
        superlink: name of the SuperLink's connection in Flower's configuration; empty for its default.

    Raises:
        FlowerRunError: there is no key, or the SuperLink refuses one; with its words.
    """
    keys = sorted(folder.glob("*.pub"))
    if not keys:
        raise FlowerRunError(f"no key in {folder}; make them with `python -m fedbasin.deploy.authority`")
    new = []
    for key in keys:
        status, out = flwr_output("supernode", "register", str(key), *([superlink] if superlink else []))
        if status == 0:
            new.append(key.stem)
        elif _KNOWN not in " ".join(out.split()):
            raise FlowerRunError(f"{key} cannot be registered; Flower says:\n{out}")
    return new


if __name__ == "__main__":
    try:
        names = register(Path(sys.argv[1]))
    except FlowerRunError as error:
        sys.exit(str(error))
    sys.stdout.write(f"registered: {', '.join(names) or 'none, all are known'}\n")
