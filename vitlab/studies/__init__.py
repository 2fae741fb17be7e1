"""What is run: the values of a study, its runs, their results, notebooks without screen. No torch."""
