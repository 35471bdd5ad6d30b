"""Attention over packed documents: named backends with declared abilities, Ulysses around any of them."""
