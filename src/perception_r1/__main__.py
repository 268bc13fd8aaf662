"""`python -m perception_r1` is the console script."""

import sys

from perception_r1.cli import main

sys.exit(main())
