"""`python -m qwen_scope_lens.cli` is `qsl`."""

import sys

from qwen_scope_lens.cli.verbs import main

if __name__ == "__main__":
    sys.exit(main())
