"""The study: strong against weak scaling, run after run, judged by rules that are declared before.

Read in this order: `arms` (what is compared), `plan` (the runs that follow), `runner` (makes them), `inference`
(judges), `results` and `report` (what comes out).
"""
