"""The study: strong against weak scaling, run after run, judged by rules that are declared before."""
