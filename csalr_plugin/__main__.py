"""``python -m csalr_plugin``, the same as the command `csalr`."""

import sys

from csalr_plugin.commands import main

if __name__ == "__main__":
    sys.exit(main())
