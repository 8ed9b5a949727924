"""Attack the tests: break the package in many small ways, and see what they notice."""
