"""The built-in page: its files as they are, and what puts them together (``shell``)."""
