"""`python -m trainer doctor`: what works on this machine."""
