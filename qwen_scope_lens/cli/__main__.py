"""`python -m qwen_scope_lens.cli` is `qsl`."""

import sys

from qwen_scope_lens.cli.verbs import main

sys.exit(main())
