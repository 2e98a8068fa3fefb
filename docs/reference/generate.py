"""``python docs/reference/generate.py``: write the four pages beside this file, from the code that they tell of.

Nothing here knows a setting, a series or a route by its name: a page says what the parser, the typed settings, the
table of series and the OpenAPI document say. What has no words there has none here either.
"""

from __future__ import annotations

from pathlib import Path

from making import commands, routes, series, settings

HERE = Path(__file__).resolve().parent
COMMAND = "python docs/reference/generate.py"
MARK = f"<!-- Made by `{COMMAND}`: change the code, not this page. -->"
PAGES = {"cli": commands.page, "configuration": settings.page, "metrics": series.page, "http": routes.page}


def files() -> dict[Path, str]:
    """Each page and its text."""
    return {HERE / f"{name}.md": f"{MARK}\n\n{page().rstrip()}\n" for name, page in PAGES.items()}


def main() -> None:
    """Write them."""
    for path, text in files().items():
        path.write_text(text, "utf-8")
        print(f"written: docs/reference/{path.name}")


if __name__ == "__main__":
    main()
