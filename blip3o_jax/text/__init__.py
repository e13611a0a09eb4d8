"""Host-side text: tokenizer, task templates, sequences. numpy only."""
