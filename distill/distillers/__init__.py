"""Methods that synthesise images or labels."""
