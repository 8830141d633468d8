"""One reader for each row format; all give harmony conversations."""
