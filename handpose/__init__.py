"""3-D hand pose networks and their hyper-parameter search."""

import os
import time

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

OPENMP_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables that set how the threads of OpenMP wait: in general, for GNU, and for LLVM and Intel (KMP)."""

# torch computes with OpenMP, whose threads by default spin for some milliseconds at each barrier. If other programs use
# the same cores, the thread that the others wait for often has no core, and a training becomes many times slower than
# its share of the cores would let it be (benchmarks/contention.py). With PASSIVE the threads sleep at once.
if not any(_name in os.environ for _name in OPENMP_WAIT_VARIABLES):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
