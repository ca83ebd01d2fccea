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

_script = os.path.realpath(sys.argv[0])
_repository = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
_is_own_script = _script in (os.path.join(_repository, name) for name in ("tune.py", "train.py"))
if _is_own_script or os.path.basename(_script) == "default_worker.py":  # of Ray; not if a user imports the package
    collect_rarely()  # until the program begins: handpose.program, or a worker's trial
