"""Records, shards, the tokenised corpus, packing and the loader."""
