"""On-policy distillation of language models: PowerOPD and every baseline it is compared with."""
