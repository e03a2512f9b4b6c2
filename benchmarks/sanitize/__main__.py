"""`python -m benchmarks.sanitize`."""

import sys

from benchmarks.sanitize.command import main

if __name__ == "__main__":
    sys.exit(main())
