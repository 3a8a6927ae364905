"""The stage report: figures, an HTML page to read offline, and a data card."""
