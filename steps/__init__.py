"""The doors: each file is an MLproject entry point of the same name, and there are no others."""
