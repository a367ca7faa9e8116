"""What commands share: options, the folder, the run of a trainer, the one embedder, tables and figures."""

import os
import sys

if "ipykernel" not in sys.modules:
    # Pictures are files. A display that the environment names, and matplotlib does not find, would end its import.
    display = os.environ.pop("MPLBACKEND", None)
    import matplotlib  # noqa: F401

    if display is not None:
        os.environ["MPLBACKEND"] = display  # for others
