"""The house behind the doors in steps/: what fetches, exports, evaluates and registers models."""

import os
import sys

# Progress bars on a terminal, plain lines in a log. tqdm reads this when it is first imported.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
