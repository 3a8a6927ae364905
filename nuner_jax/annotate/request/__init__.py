"""The stage request: endpoints, what they answer, and the two ways to ask, live and in batches."""
