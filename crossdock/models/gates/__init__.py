"""Gates: which experts a token goes to, with what weight, and what keeps their load even."""
