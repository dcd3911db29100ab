"""Starts and watches training runs. Importing it never imports torch."""
