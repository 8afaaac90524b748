"""Runs what README.md tells its readers to run: every fenced block marked `bash`, in order, in this folder.

    python tests/readme_commands.py --skip "git clone" --skip "make test"

`--skip` leaves out the lines that begin so: what needs the network, or what the caller has run already.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def bash_blocks(markdown: str) -> list[str]:
    """Return the text of every fenced code block that is marked `bash`."""
    return re.findall(r"^```bash\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip", action="append", default=[], metavar="START", help="leave out such lines")
    skip = tuple(parser.parse_args().skip)
    blocks = bash_blocks(README.read_text())
    if not blocks:
        print(f"{README} has no bash block")
        return 1
    for block in blocks:
        script = "\n".join(line for line in block.splitlines() if not line.lstrip().startswith(skip))
        print(script, flush=True)
        code = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=README.parent).returncode
        if code != 0:
            print(f"README.md: this block failed with exit code {code}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
