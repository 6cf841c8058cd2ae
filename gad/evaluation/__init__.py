"""What the tables are made of, a file each."""
