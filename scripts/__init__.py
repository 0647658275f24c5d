"""Every command a person runs, one file each. Imports anything, imported by nothing."""
