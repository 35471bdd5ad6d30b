"""How ranks work together: mesh, FSDP2, Ulysses."""
