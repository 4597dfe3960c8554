"""Between tokens and text: files that are read, pieces of any size, and what is handed out."""
