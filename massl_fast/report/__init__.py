"""report.html of a run. Its figures, and those of benchmark pages, are matplotlib's."""

from massl_fast.extras import needs

needs("matplotlib", "a report", "report")
