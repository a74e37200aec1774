"""``python -m massl_fast``, for torchrun."""

import sys

from massl_fast.cli import main

sys.exit(main())
