"""Built-in handlers, one short file each: use them by name, or copy one and change it.

Installed, this package is called `receiver_handlers`, so that it never meets a user's `handlers`.
"""
