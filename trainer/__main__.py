"""`python -m trainer`."""

import sys

from .commands.cli import main
from .commands.ending import end

if __name__ == "__main__":
    code = main()
    if "deepspeed" in sys.modules:
        end(code)
    sys.exit(code)
