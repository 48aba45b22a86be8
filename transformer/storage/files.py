"""Small files that are there whole or not at all."""

import json
import os
from pathlib import Path


def write_json(path: Path, value) -> None:
    """Writes a file of JSON that is there whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(unfinished, path)
