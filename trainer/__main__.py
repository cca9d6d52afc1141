"""`python -m trainer`."""

import signal
import sys

from .ranks.stopping import end_at_once
from .ranks.streams import open_streams

# Before the imports below, which take longer: a Ctrl-C during them would otherwise end in a traceback.
if __name__ == "__main__":
    open_streams()
    signal.signal(signal.SIGINT, end_at_once)

from .commands.cli import main
from .commands.ending import end

if __name__ == "__main__":
    code = main()
    if "deepspeed" in sys.modules:  # a run was made in this process: its clean-up takes seconds, and could crash
        end(code)
    sys.exit(code)
