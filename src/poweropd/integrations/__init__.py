"""Our objectives inside other trainers. Nothing here is imported by poweropd itself; each module needs its trainer."""
