"""What a run tells about itself: costs of steps, where records go, what the terminal shows."""
