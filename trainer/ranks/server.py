"""Imported first by the server from which ranks are forked: gives it the environment that its ranks are to have.

The server is started with variables of its own, so that it finds this very trainer.
"""

from __future__ import annotations

import json
import os

# Holds JSON: name -> value, or null for a variable that is to go.
RESTORED = "TRAINER_SERVER_RESTORES"


def restore() -> None:
    """Gives the variables back that were changed for the server's start."""
    for name, value in json.loads(os.environ.pop(RESTORED, "{}")).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


restore()
