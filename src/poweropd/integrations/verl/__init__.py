"""Our objectives inside verl: `losses` registers them (the entry point `verl.plugins`), `check` says whether they are there."""
