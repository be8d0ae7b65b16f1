"""Where neighbors come from."""
