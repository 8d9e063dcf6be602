"""What a recipe needs of memory and time, before anything is loaded or bought."""
