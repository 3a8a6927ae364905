"""Few-shot transfer: what an encoder has learnt, measured with few labelled sentences.

words.py and tagged_files.py read, named_sets.py knows public sets, datasets.py gives data sets with
stated splits, and sampling.py draws the few sentences.
"""
