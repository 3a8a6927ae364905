"""The stage select: sources → units → filters → duplicates → a seeded sample."""
