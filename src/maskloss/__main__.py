"""`python -m maskloss`, which is what torchrun and accelerate launch start."""

import sys

from maskloss.lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
