"""What compares: the audit, the guard, hashes. A fault that the construction cannot rule out is found here."""
