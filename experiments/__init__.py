"""One script per story: settings in, a report or a result card out."""
