"""Training: recipes, balanced batches and the two stages."""
