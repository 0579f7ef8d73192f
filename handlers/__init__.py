"""Built-in handlers, one short file each: use them by name, or copy one and change it."""
