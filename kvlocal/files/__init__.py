"""Files: written whole or not at all, appended to line by line, locked, told apart by what they hold; how texts come in, and where things are."""
