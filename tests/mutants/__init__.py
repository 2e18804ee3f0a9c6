"""`make mutants`: the relay with one thing broken at a time, and the tests that must notice."""
