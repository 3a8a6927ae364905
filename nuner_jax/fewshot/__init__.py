"""Few-shot transfer: what an encoder has learnt, measured with few labelled sentences.

plan.py reads and checks all, material.py and sampling.py say which sentences, features.py and heads.py compute,
scoring.py scores, results.py averages the rows, and tables.py, figures.py and page.py show them; run.py is the whole.
"""
