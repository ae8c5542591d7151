"""What people look at: the page, the figures and the tables of a report, and its numbers as JSON."""
