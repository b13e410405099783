"""Write the snapshot of the minimal scenario and the picture anew: `python tests/chart/update_golden.py`."""

import sys
from pathlib import Path

import picture
from helm import render

GOLDEN = Path(__file__).parent / "golden" / "minimal.yaml"


def golden() -> str:
    """The rendered text; the recipes, which change for reasons of their own, have other tests."""
    return render("minimal", "--set", "recipes.enabled=false").text


if __name__ == "__main__":
    GOLDEN.write_text(golden(), encoding="utf-8")
    drawn = picture.page(picture.PAGE.read_text(encoding="utf-8"), render(picture.SCENARIO).objects)
    picture.PAGE.write_text(drawn, encoding="utf-8")
    sys.stdout.write(f"{GOLDEN}\n{picture.PAGE}\n")
