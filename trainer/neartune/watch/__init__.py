"""A run under way: what the machine does, shown on the terminal and handed to monitors."""
