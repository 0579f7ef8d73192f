"""The app as another server finds it: made when it is imported, without `receiver serve`."""

from receiver import create_app

app = create_app()
