"""A file per method of fine-tuning: its configuration, and how it enters the verbs."""
