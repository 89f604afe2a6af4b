"""What a network is and does: counts, costs, pictures."""
