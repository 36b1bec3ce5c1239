"""From data files to batches: sources → formats → chat → labels → tokenize → batches; prompts for generation."""
