"""One thread for all tests: their tensors are small, and threads that wait for each other lose."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
