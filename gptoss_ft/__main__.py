"""`python -m gptoss_ft`, the same as `gptoss-ft`."""

import sys

from gptoss_ft.cli import main

sys.exit(main())
