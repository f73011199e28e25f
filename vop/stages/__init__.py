"""Ray, and only here: how the steps are distributed."""
