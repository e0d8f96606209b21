"""Adapter directories, ours and PEFT's: read, checked and written."""
