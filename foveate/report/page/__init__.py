"""One self-contained HTML page for a graph diff."""

from foveate.report.page.document import diff_page

__all__ = ["diff_page"]
