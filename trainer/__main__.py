"""`python -m trainer`."""

import signal
import sys

from .ranks.stopping import end_at_once
from .ranks.streams import open_streams

if __name__ == "__main__":
    open_streams()
    signal.signal(signal.SIGINT, end_at_once)

from .commands.cli import main
from .commands.ending import end

if __name__ == "__main__":
    code = main()
    if "deepspeed" in sys.modules:
        end(code)
    sys.exit(code)
