"""`python -m trainer doctor`: tries what works on this machine."""
