"""Data sets of named entities: files in several formats, or sets known by name, with stated splits.

named_sets.py knows sets by name, set_spec.py is what a config says, tagged_files.py reads tags, datasets.py puts a set
together, set_report.py tells what it holds, and words.py divides texts into words.
"""
