"""Analysis of networks and runs: predictions, explanations, counts, costs and curves."""
