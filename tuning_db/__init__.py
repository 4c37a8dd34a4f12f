"""Reviewed winners, one `<arch>.jsonl` a GPU architecture; imported into the user's database on first open."""
