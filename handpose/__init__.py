"""3-D hand pose networks and their hyper-parameter search."""

import os
import sys
import time

from handpose.garbage import collect_rarely

IMPORTED_AT = time.time()
"""When this process imported the package, in seconds since the epoch. The scripts import it first."""

# Libraries read these variables when they are imported, which happens after this line. Values that the user has set are
# kept. docs/security.md lists what each library would send.
for _switch, _value in (
    ("ORT_DISABLE_TELEMETRY", "1"),  # ONNX Runtime
    ("HF_HUB_DISABLE_TELEMETRY", "1"),  # Hugging Face Hub, from which timm gets weights
    ("WANDB_ERROR_REPORTING", "false"),  # Weights & Biases
):
    os.environ.setdefault(_switch, _value)

if os.path.basename(sys.argv[0]) in ("tune.py", "train.py", "default_worker.py", "-m"):  # not if a user imports it
    collect_rarely()  # until the program begins: handpose.program, or a worker's trial
