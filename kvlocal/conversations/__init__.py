"""Conversations on disk: transcripts, snapshots of the cache, named sessions, files of dialogues, and how a session gets back to where one stood."""
