"""From raw text to aligned shards through a language model: select, request, align, build, report."""
