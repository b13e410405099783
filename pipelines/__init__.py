"""Compositions of components, and the command line that runs, compiles and inspects them."""
