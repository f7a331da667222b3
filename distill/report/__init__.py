"""What a run tells at its end: the table on the terminal, report.json and report.html."""
