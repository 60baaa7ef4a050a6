"""From files and hub names to tokenised examples: sources, formats, tokens, partition, and text made here."""
