"""What is run: the values of a study, its runs, their results, notebooks without a screen. No torch."""
