"""What `python tools/bench.py` finds in the place of the real cli.py, for so started it imports from this folder alone:
a sentence instead of a traceback. `python -m tools.bench` does not come here."""
import sys
from pathlib import Path

if __name__ == "cli":
    tool, root = Path(sys.argv[0]), Path(__file__).resolve().parent.parent
    print(f"{tool.name}: run it in the folder {root} as python -m tools.{tool.stem}", file=sys.stderr)
    sys.exit(2)
