"""Loaded by Python itself at start, where this directory is in PYTHONPATH: the process lives HOURS_LATER than everyone else.

Its clock is slow, so that what a test finds does not depend on how fast the machine is.
"""

import os
import time

_RATE = 0.01
_now = time.time
_start = _now()
_later_s = 3600.0 * float(os.environ.get("HOURS_LATER", "0"))
time.time = lambda: _start + _later_s + (_now() - _start) * _RATE
