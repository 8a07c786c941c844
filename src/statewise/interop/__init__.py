"""Living with other libraries: their checkpoints, their names, their trainers. Acts on the library from outside."""
