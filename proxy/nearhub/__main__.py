"""``python -m nearhub``: the same as the ``nearhub`` command."""

import sys

from nearhub.cli import main

sys.exit(main())
