"""python -m launcher: the same as dist-train."""

import os
import sys

# `-m` puts the working directory first on the path; a user's own slurm/ or recipes/ there must not hide ours.
if sys.path and sys.path[0] in ("", os.getcwd()):
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if here != os.getcwd():
        del sys.path[0]

from launcher.cli import main

main()
