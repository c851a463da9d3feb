"""The model outside any engine: how it is made, where its values come from, how it is exported."""
