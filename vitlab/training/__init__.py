"""Images, and the one loop that trains on them."""
