"""What every page shares: templates that escape, and files that appear whole or not at all."""

from pathlib import Path
from typing import Any

from coterie.data import written_whole
from coterie.report.attraction import show
from coterie.report.tables import format_number


def fill_template(name: str, **content: Any) -> str:
    """A template of this folder, filled; text in `content` is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters.update(show=show, number=format_number)
    return environment.get_template(name).render(**content)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under another name first; folders above it are created."""
    with written_whole(path) as draft:
        draft.write_text(text, "utf-8", newline="\n")
