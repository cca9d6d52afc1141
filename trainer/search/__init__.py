"""The search for a good configuration: trials that see validation only, and one test at the end."""
