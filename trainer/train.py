"""`python train.py --config config.yaml --use_mirror`: a thin door to `neartune train`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # also without an installed distribution

from neartune.cli import main

if __name__ == "__main__":
    sys.exit(main(verb="train"))
