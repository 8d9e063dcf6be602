"""Other trainers, run in an environment of their own. Nothing here may import poweropd."""
