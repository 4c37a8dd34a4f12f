"""Choice: which configs to try, on which problems, within which budget, and which one wins."""
