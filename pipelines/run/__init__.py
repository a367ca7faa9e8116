"""What commands share: options, the folder, the run of a trainer, the one embedder, tables and figures."""

import os
import sys

if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # pictures are files, whatever display the environment names
