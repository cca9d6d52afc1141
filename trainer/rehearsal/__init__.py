"""Before the first step: does this task keep the promise? If not, what breaks it, in words."""
