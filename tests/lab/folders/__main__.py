"""Writes the table of the documentation."""

from lab.folders import write_page

write_page()
