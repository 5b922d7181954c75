"""The demo's material: a recipe, and conversations of our own writing that train and measure its gate."""
