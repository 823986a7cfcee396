"""What every launcher runs on every rank: who it is, where ranks meet, what they do together, and who was lost."""
