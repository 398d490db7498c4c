"""From modules to the one program that ships: link, drop what nothing reaches, minify, compress, and try it out."""
