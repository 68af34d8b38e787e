"""Comparison of finished runs: reads run directories; imports neither torch nor, until it draws, matplotlib."""
