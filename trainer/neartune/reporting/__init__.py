"""A finished run on paper: report.html, model card, and the facts they are made of."""
