"""Write the snapshot of the minimal scenario anew: `python tests/chart/update_golden.py`."""

import sys
from pathlib import Path

from helm import render

if __name__ == "__main__":
    path = Path(__file__).parent / "golden" / "minimal.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(render("minimal").text, encoding="utf-8")
    sys.stdout.write(f"{path}\n")
