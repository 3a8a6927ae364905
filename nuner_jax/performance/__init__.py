"""What a step must compute and move, what the devices reach, and what a compiled program says of itself."""
