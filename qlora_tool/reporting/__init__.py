"""`report.html`: what a run was, what came of it and what was made of it, as one page that loads nothing."""
