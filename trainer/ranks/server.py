"""The server from which ranks are forked imports this first. It restores the environment for the ranks.

The server is started with changed variables, so that it finds this very trainer. Its ranks must not inherit them.
"""

from __future__ import annotations

import json
import os

# Holds JSON: name -> value, or null for a variable that is to go.
RESTORED = "TRAINER_SERVER_RESTORES"


def restore() -> None:
    """Restores the variables that were changed for the server's start."""
    for name, value in json.loads(os.environ.pop(RESTORED, "{}")).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


restore()
