"""Commands: thin, parse, build, call."""

import os

# Before torch loads OpenMP: threads that spin while they wait slow each other down where other programs run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
