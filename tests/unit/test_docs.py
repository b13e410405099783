"""Generated pages, schema and golden pipeline are what the code gives; `make docs` writes them anew."""

import importlib.util
from pathlib import Path


def test_nothing_generated_is_out_of_date():
    path = Path(__file__).parents[2] / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", path)
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    files = generate.generated()
    assert files, "nothing is generated"
    assert generate.outdated(files) == []
