"""Plans: what a size needs on a slice, before the slice is rented."""
