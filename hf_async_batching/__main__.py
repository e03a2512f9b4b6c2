"""`python -m hf_async_batching` is the command line."""

import sys

from hf_async_batching.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
