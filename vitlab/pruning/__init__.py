"""What goes, and how what stays makes up for it."""
