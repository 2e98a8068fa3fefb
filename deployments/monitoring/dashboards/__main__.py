"""``python -m deployments.monitoring.dashboards``: write what is generated, the dashboards and a table of the docs."""

from __future__ import annotations

from deployments.monitoring.dashboards.catalogue import files


def main() -> None:
    for path, text in files().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
