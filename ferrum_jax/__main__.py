"""`python -m ferrum_jax` is the command `ferrum-jax`."""

import sys

from ferrum_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
