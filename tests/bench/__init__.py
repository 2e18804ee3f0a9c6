"""`make bench`: measures the budgets on real processes, and prints them beside what was measured."""
