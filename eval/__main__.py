"""`python -m eval`: see eval.command."""

import gc
import os
import sys

gc.disable()  # what is imported stays; looking for garbage among a million objects takes a second

import open_clip  # noqa: E402, F401

from eval.command import main  # noqa: E402

gc.freeze()
gc.enable()

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all files are closed; taking the modules apart takes another second
