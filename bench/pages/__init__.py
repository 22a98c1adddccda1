"""Tables, pictures and targets, made from committed rows."""
