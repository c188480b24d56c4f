"""`python -m neartune`."""

import sys

from neartune.cli import main

sys.exit(main())
