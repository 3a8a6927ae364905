"""Files in several formats become a stream of records, and a report of what became of each row.

rows.py reads files, formats.py and conll.py understand their rows, hub.py fetches, report.py
counts, and stream.py puts them together.
"""

from nuner_jax.data.importers.report import Report, report_table
from nuner_jax.data.importers.stream import (
    FORMATS,
    SAMPLE,
    ImportOptions,
    import_records,
    resolve_inputs,
)

__all__ = [
    "FORMATS",
    "SAMPLE",
    "ImportOptions",
    "Report",
    "import_records",
    "report_table",
    "resolve_inputs",
]
