"""What people read about a model: tables as data, and the numbers in them."""
