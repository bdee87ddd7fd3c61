"""Where a rewritten graph becomes something that runs."""
