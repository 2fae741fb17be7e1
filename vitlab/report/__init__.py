"""What the results say: tables, figures, and frames of the inside."""
