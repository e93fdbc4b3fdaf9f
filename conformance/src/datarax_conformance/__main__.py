"""`python -m datarax_conformance` is the command `datarax-conformance`."""

import sys

from .cli import main

sys.exit(main())
