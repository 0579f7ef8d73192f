#!/bin/sh
# Tried here: as a command, without the Web Adapter. It is the handler of Adapter=web, which says PORT.
exec python3 -m receiver serve
