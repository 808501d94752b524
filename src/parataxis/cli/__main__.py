"""``python -m parataxis.cli``."""

import sys

from .app import main

sys.exit(main())
