"""One run, from its settings to its report; only the epochs may be computed in other processes."""

import os
import sys

# The cores that this process may use, before importing torch can pin it to one of them; None if that is unknown.
INITIAL_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") and "torch" not in sys.modules else None
PINNING_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")  # with one of them, importing torch does that
