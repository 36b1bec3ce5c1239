"""From data files to batches: sources → formats → chat → tokenize → batches; prompts for generation."""
