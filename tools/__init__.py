"""What builds the book: run notebooks, check them, assemble the site."""
