"""Files: written whole or not at all, appended to line by line, told apart by what they hold."""
