"""What the results say: tables, figures, pages and the explorer."""
