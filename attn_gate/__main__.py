import sys

from attn_gate.cli import main

sys.exit(main())
