"""Networks in place of an app's own, whose layers are frozen random ones or solved in closed form."""
